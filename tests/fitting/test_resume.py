"""A fit that was broken off goes on to the same bits, and a checkpoint is whole at every moment."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import FitOptions, FitResult, Program, UsageError, fit
from graphopt.errors import WriteError
from graphopt.fit import FitProgress
from graphopt.fitting import checkpoint
from graphopt.gradient_estimators import straight_through_step
from tests.fitting.cases import Feeds, Gated, feeds, perturbed, same, square
from tests.models import program


class Broken(Exception):
    """Stands for whatever ends a process."""


def breaking(step: int, error: type[BaseException]) -> Callable[[FitProgress], None]:
    def progress(state: FitProgress) -> None:
        if state.step == step:
            raise error

    return progress


OPTIONS = {
    "adamw": FitOptions(epochs=4, accumulate=3, weight_decay=0.01, patience=50),
    "sgd": FitOptions(optimizer="sgd", learning_rate=0.05, steps=11, schedule="cosine", evaluate_every=4),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_interrupted_fit_goes_on_to_the_same_bits(name: str, step: int, tmp_path: Path) -> None:
    teacher, data = program("mlp"), feeds(12)
    student = perturbed(teacher, "first.weight")
    arguments: dict[str, Any] = {"train": ["first.*"], "teacher": teacher, "options": OPTIONS[name]}
    whole = fit(student, data, **arguments)
    path = tmp_path / "fit.ckpt"
    with pytest.raises(KeyboardInterrupt):
        fit(student, data, checkpoint=path, progress=breaking(step, KeyboardInterrupt), **arguments)
    assert torch.load(path, weights_only=True)["position"]["step"] == step
    assert [file.name for file in tmp_path.iterdir()] == ["fit.ckpt"]
    steps: list[int] = []
    rest = fit(student, data, checkpoint=path, resume=True, progress=lambda p: steps.append(p.step), **arguments)
    assert same(whole, rest) and steps[0] == step + 1
    again = fit(student, data, checkpoint=path, resume=True, **arguments)
    assert same(whole, again)


def test_a_fit_that_died_goes_on_from_its_last_evaluation(tmp_path: Path) -> None:
    teacher, data = program("mlp"), feeds(12)
    student = perturbed(teacher, "first.weight")
    arguments: dict[str, Any] = {"train": ["first.*"], "teacher": teacher, "options": OPTIONS["adamw"]}
    path = tmp_path / "fit.ckpt"
    with pytest.raises(Broken):
        fit(student, data, checkpoint=path, progress=breaking(6, Broken), **arguments)
    assert torch.load(path, weights_only=True)["position"]["step"] == 4  # four steps an epoch
    assert same(fit(student, data, **arguments), fit(student, data, checkpoint=path, resume=True, **arguments))


def test_an_interrupt_amid_a_step_leaves_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = program("mlp"), feeds(12)
    student = perturbed(teacher, "first.weight")
    arguments: dict[str, Any] = {"train": ["first.*"], "teacher": teacher, "options": OPTIONS["adamw"]}
    whole = fit(student, data, **arguments)
    path, calls, step = tmp_path / "fit.ckpt", itertools.count(1), torch.optim.AdamW.step

    def interrupted(self: Any, closure: Any = None) -> Any:
        if next(calls) == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(7.0)
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        fit(student, data, checkpoint=path, **arguments)
    assert same(whole, fit(student, data, checkpoint=path, resume=True, **arguments))


def test_more_steps_after_the_end(tmp_path: Path) -> None:
    teacher, data = program("mlp"), feeds(10)
    student = perturbed(teacher, "first.weight")

    def run(epochs: int, **options: Any) -> FitResult:
        return fit(student, data, train=["first.*"], teacher=teacher, options=FitOptions(epochs=epochs), **options)

    run(1, checkpoint=tmp_path / "c")
    assert same(run(3), run(3, checkpoint=tmp_path / "c", resume=True))


def test_noise_of_estimators_repeats(tmp_path: Path) -> None:
    source = graphopt.capture(Gated(), (torch.randn(3, 4),))
    data: Feeds = [{"x": torch.randn(3, 4)} for _ in range(10)]
    arguments: dict[str, Any] = {
        "train": ["gate"],
        "loss": lambda outputs, _: outputs[0].square().mean(),
        "estimators": {"gt": lambda x, _: straight_through_step(x + 0.3 * torch.randn(4))},
        "options": FitOptions(epochs=2),
    }
    whole = fit(source, data, **arguments)
    with pytest.raises(KeyboardInterrupt):
        fit(source, data, checkpoint=tmp_path / "c", progress=breaking(5, KeyboardInterrupt), **arguments)
    torch.randn(100)
    assert same(whole, fit(source, data, checkpoint=tmp_path / "c", resume=True, **arguments))


def test_checkpoints_of_others(tmp_path: Path) -> None:
    path = tmp_path / "c"
    arguments: dict[str, Any] = {"loss": square, "checkpoint": path}
    options = FitOptions(steps=2)
    fit(program("mlp"), feeds(5), train=["*"], options=options, **arguments)
    with pytest.raises(UsageError, match="exists; write resume=True to go on from it, or delete it"):
        fit(program("mlp"), feeds(5), train=["*"], options=options, **arguments)
    other = perturbed(program("mlp"), "first.weight")
    wrong: list[tuple[Program, Feeds, list[str], FitOptions, str]] = [
        (
            program("mlp"),
            feeds(5),
            ["first.*"],
            options,
            "it trains first.weight.* instead of first.weight",
        ),
        (program("mlp"), feeds(5), ["*"], replace(options, seed=4), "seed was 0 and is 4"),
        (program("mlp"), feeds(6), ["*"], options, "samples was {.*} and is"),
        (other, feeds(5), ["*"], options, "it began from other values of the weights"),
    ]
    for source, data, train, changed, words in wrong:
        with pytest.raises(UsageError, match=f"is of another fit: {words}"):
            fit(source, data, train=train, options=changed, resume=True, **arguments)
    content = path.read_bytes()
    flipped = bytearray(content)
    master = torch.load(path, weights_only=True)["masters"][0]
    flipped[content.index(master.numpy().tobytes()) + 3] ^= 1
    for damaged in (b"", b"text", content[: len(content) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="cannot be read; delete it to begin anew"):
            fit(program("mlp"), feeds(5), train=["*"], options=options, resume=True, **arguments)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write the checkpoint .*No such file"):
        fit(program("mlp"), feeds(5), train=["*"], loss=square, checkpoint=tmp_path / "missing" / "c")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_happens_while_a_checkpoint_is_written(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.FileIO):
        def write(self, data: Any) -> int:
            raise error

    path = tmp_path / "c"
    state = {"masters": [torch.randn(3)]}
    checkpoint.save(path, state)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "open", Failing, raising=False)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else WriteError):
        checkpoint.save(path, state)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c"]
