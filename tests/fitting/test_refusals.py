"""What cannot be trained, and what breaks down, is said in one sentence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Distillation, FitOptions, UnknownNameError, UsageError, fit
from graphopt.errors import FitError
from tests.fitting.cases import Feeds, feeds, square
from tests.models import program


def test_a_branch_that_no_sample_takes() -> None:
    data: Feeds = [{"x": torch.rand(3, 8)} for _ in range(10)]
    arguments: dict[str, Any] = {"teacher": program("branching"), "options": FitOptions(epochs=2, weight_decay=0.9)}
    with pytest.raises(UsageError, match=r"no gradient to small\.weight; leave it out of train"):
        fit(program("branching"), data, train=["large.0.weight", "small.weight"], **arguments)
    fit(program("branching"), data, train=["large.0.weight"], **arguments)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "c"
    options = FitOptions(optimizer="sgd", learning_rate=1e9, epochs=5)

    with pytest.raises(FitError, match=r"step \d+ is (inf|nan|not).* not finite; use a lower learning_rate.*holds the"):
        fit(program("mlp"), feeds(20), train=["*"], loss=square, options=options, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert all(bool(master.isfinite().all()) for master in state["masters"])
    with pytest.raises(FitError, match="held-out data after step 0 is inf"):
        fit(program("mlp"), feeds(20), train=["*"], loss=lambda o, _: o[0].sum() * 0 + math.inf)


def diverging(step: int) -> Callable[[tuple[Tensor, ...], Tensor | None], Tensor]:
    """A loss that is not finite in the given step."""
    calls = itertools.count(1)

    def loss(outputs: tuple[Tensor, ...], label: Tensor | None) -> Tensor:
        value = outputs[0].square().mean()
        return value * math.nan if torch.is_grad_enabled() and next(calls) == step else value

    return loss


def test_the_step_is_named() -> None:
    with pytest.raises(FitError, match="the loss of step 3 is nan, not finite; use a lower learning_rate or clip_norm"):
        fit(program("mlp"), feeds(20), train=["*"], loss=diverging(3))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train": ["first.wieght"]}, r"unknown weight 'first\.wieght'; did you mean 'first\.weight'"),
    ({"train": ["third.*"]}, r"unknown weight 'third\.\*'"),
    ({"train": "first.weight"}, r"must be a sequence of names or patterns: train=\['first\.weight'\]"),
    ({"train": []}, "train is empty"),
    ({"loss": None}, "give a loss"),
    ({"loss": "mse"}, "the loss 'mse' is a distance from a teacher's outputs; give teacher="),
    ({"loss": "l1"}, "loss='l1' is none of mse, relative, kl, cosine, cross-entropy and no function"),
    ({"loss": "l1", "teacher": "itself"}, "loss='l1' is none of"),
    ({"options": {"epochs": 1}}, "options is dict; write options=graphopt.FitOptions"),
    ({"loss": "cross-entropy"}, "needs labels, but the data has none"),
    ({"teacher": "itself"}, "a teacher has no effect on this loss"),
    ({"loss": lambda outputs, label: outputs[0]}, r"one floating-point number, got torch\.float32 \[4, 16\]"),
    ({"loss": lambda outputs, label: 1.0}, "one floating-point number, got a float"),
    ({"loss": lambda outputs, label: outputs[0].detach().sum()}, "step 1 depends on none of first.weight, first.bias"),
    ({"loss": Distillation("mse", ("result",)), "teacher": "itself"}, "unknown output of .* 'result'"),
    ({"resume": True}, "resume=True needs checkpoint"),
    ({"data": feeds(1)}, "give at least two samples"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_wrong_arguments(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"data": feeds(5), "train": ["*"], "loss": square, **changes}
    if arguments.get("teacher") == "itself":
        arguments["teacher"] = program("mlp")
    with pytest.raises(UsageError, match=words):
        fit(program("mlp"), **arguments)


def test_a_module_is_no_program() -> None:
    with pytest.raises(UsageError, match=r"fit takes a Program, got Linear; make one with graphopt\.capture"):
        fit(torch.nn.Linear(2, 2), feeds(5), train=["*"], loss=square)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "lion"}, "optimizer='lion' is none of adamw, sgd"),
        ({"schedule": "linear"}, "schedule='linear' is none of constant, cosine, one-cycle"),
        ({"learning_rate": 0}, "learning_rate=0 must be a positive number"),
        ({"clip_norm": math.inf}, "clip_norm=inf must be a positive number"),
        ({"weight_decay": -1}, "weight_decay=-1 must be 0 or"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"patience": 1.5}, r"patience=1\.5 must be a whole number"),
        ({"steps": 3, "epochs": 4}, "steps=3 and epochs=4 exclude each other"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FitOptions(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "l1"}, "kind='l1' is none of"),
        ({"outputs": "logits"}, r"outputs=\('logits',\)"),
        ({"temperature": 2.0}, "has no effect on 'mse'"),
        ({"kind": "kl", "temperature": 0.0}, "must be positive"),
        ({"task_weight": 0.5}, "has no effect without a task loss"),
    ],
)
def test_wrong_distillation(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Distillation(**options)


def test_weights_that_cannot_be_trained() -> None:
    data: Feeds = [{"x": torch.randn(4, 6)} for _ in range(5)]

    class Unused(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 3)
            self.second = nn.Linear(6, 3)
            self.register_buffer("steps", torch.arange(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.first(x), self.second(x).argmax(-1), self.steps + 1

    source = graphopt.capture(Unused(), (torch.randn(4, 6),))
    with pytest.raises(UsageError, match=r"'second\.weight' gets no gradient: stopped by argmax \(aten\.argmax"):
        fit(source, data, train=["*.weight"], loss=square)
    with pytest.raises(UsageError, match=r"'steps' is torch\.int64; only floating-point"):
        fit(source, data, train=["steps"], loss=square)
    result = fit(source, data, train=["first.*"], loss=square, options=FitOptions(steps=2))
    assert result.trained == ("first.weight", "first.bias")


def test_an_output_that_the_loss_leaves_out() -> None:
    teacher = program("dict_output")
    data: Feeds = [{"x": torch.randn(4, 6)} for _ in range(5)]
    with pytest.raises(UsageError, match=r"found\.index' of .* is torch\.int64"):
        fit(teacher, data, train=["layer.*"], loss=Distillation(outputs=("found.index",)), teacher=teacher)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    source = graphopt.capture(Two(), (torch.randn(4, 6),))
    with pytest.raises(UsageError, match=r"no gradient to b\.weight, b\.bias; leave it out of train"):
        fit(source, data, train=["*"], loss=square)


def test_a_teacher_of_another_shape() -> None:
    x = torch.randn(2, 16)
    other = graphopt.capture(nn.Linear(16, 4), (x,), dynamic_shapes={"input": {0: "batch"}})
    with pytest.raises(UnknownNameError, match=r"unknown input of .* 'input'"):
        fit(program("mlp"), feeds(5), train=["*"], teacher=other)

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4] * 2

    narrow = graphopt.capture(Narrow(), (x,), dynamic_shapes={"x": {0: "batch"}})
    with pytest.raises(UsageError, match=r"output 'output' is \[4, 16\], the teacher's is \[4, 4\]"):
        fit(program("mlp"), feeds(5), train=["*"], teacher=narrow)


def test_labels_that_do_not_fit() -> None:
    data: Feeds = [(feed, torch.zeros(3)) for feed in feeds(5)]
    with pytest.raises(UsageError, match=r"\[4, 16\], has logits for 4 labels, but the label of .* is \[3\]"):
        fit(program("mlp"), data, train=["*"], loss="cross-entropy")


def test_what_pytorch_cannot_compute() -> None:
    with pytest.raises(FitError, match=r"step 1 cannot be computed in PyTorch: .*shape"):
        fit(program("mlp"), feeds(5), train=["*"], loss=lambda o, _: (o[0] @ o[0]).sum() if o[0].requires_grad
            else o[0].sum())  # fmt: skip
