"""`graphopt.fit`: what is learned, and what stays untouched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Distillation, FitOptions, Program, UnknownNameError, UsageError, fit
from graphopt.fit import FitProgress
from graphopt.fitting.losses import make_objective
from graphopt.fitting.options import EPOCHS
from graphopt.gradient_estimators import straight_through_round, straight_through_step
from graphopt.program import set_attribute
from graphopt.progress import told_to
from tests.fitting.cases import Feeds, Gated, feeds, perturbed, same, square, tensors
from tests.models import program


@pytest.mark.parametrize("kind", ["mse", "relative", "cosine", "kl"])
def test_distillation_recovers_a_layer(kind: Any) -> None:
    teacher = program("mlp")
    student = perturbed(teacher, "first.weight")
    options = FitOptions(learning_rate=0.02, steps=200, schedule="cosine")
    result = fit(student, feeds(40, rows=16), train=["first.weight"], loss=kind, teacher=teacher, options=options)
    assert min(item.held_out for item in result.history) < result.history[0].held_out / 20
    assert result.trained == ("first.weight",) and result.stopped_by == "steps"


def test_distillation_recovers_a_layer_of_bert() -> None:
    teacher = program("bert")
    name = "model.encoder.layer.1.output.dense.weight"
    ids = [torch.randint(0, 100, (8, 6)) for _ in range(20)]
    data = [{"input_ids": value, "attention_mask": torch.ones_like(value)} for value in ids]
    options = FitOptions(learning_rate=1e-2, epochs=3, schedule="cosine")
    result = fit(perturbed(teacher, name, 3.0), data, train=[name], teacher=teacher, options=options)
    assert result.history[-1].held_out < result.history[0].held_out / 10


def test_only_what_is_named_changes_and_the_input_stays() -> None:
    student = perturbed(program("mlp"), "first.weight")
    before = {name: value.clone() for name, value in tensors(student).items()}
    held = tensors(student)
    result = fit(student, feeds(10), train=["*.bias"], teacher=program("mlp"), options=FitOptions(epochs=2))
    assert result.trained == ("first.bias", "second.bias")
    after = tensors(result.program)
    for name, value in held.items():
        assert tensors(student)[name] is value and torch.equal(value, before[name])
        assert value.grad is None and not value.requires_grad
        assert (after[name] is value) == name.endswith("weight")
        assert torch.equal(after[name], value) == name.endswith("weight")
        assert isinstance(after[name], nn.Parameter) and not after[name].requires_grad


def test_gradients_reach_no_weight_that_is_not_named() -> None:
    student = program("mlp").copy()
    second = nn.Parameter(torch.randn(16, 32))
    set_attribute(student.graph_module, "second.weight", second)
    fit(student, feeds(5), train=["first.*"], teacher=program("mlp"), options=FitOptions(epochs=1))
    assert second.grad is None and second.requires_grad


def test_a_fit_repeats_and_leaves_the_global_generator() -> None:
    data, teacher = feeds(10), program("mlp")
    student = perturbed(teacher, "first.weight")
    state = torch.get_rng_state()
    runs = [
        fit(student, data, train=["first.*"], teacher=teacher, options=FitOptions(epochs=2, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_under_no_grad() -> None:
    with torch.no_grad():
        result = fit(
            perturbed(program("mlp"), "first.bias"), feeds(5), train=["first.bias"], teacher=program("mlp"),
            options=FitOptions(epochs=1),
        )  # fmt: skip
    assert result.best_step > 0


def test_accumulating_four_samples_equals_one_of_four() -> None:
    teacher = program("mlp")
    student = perturbed(teacher, "first.weight")
    rows = torch.randn(20, 16)
    single: Feeds = [{"x": row[None]} for row in rows]
    joined: Feeds = [{"x": part} for part in rows.split(4)]
    held_out = joined[4:]
    results = [
        fit(student, data, train=["first.*"], teacher=teacher, options=FitOptions(steps=1, accumulate=count))
        for data, count in ((single[:4] + held_out, 4), (joined[:1] + held_out, 1))
    ]
    left, right = (tensors(result.program) for result in results)
    assert results[0].history[1].loss == pytest.approx(results[1].history[1].loss, rel=1e-5)
    torch.testing.assert_close(left["first.weight"], right["first.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(left["first.weight"], tensors(student)["first.weight"])


def test_rates() -> None:
    for schedule, wanted in (("constant", [1, 1, 1]), ("cosine", [1, 0.75, 0.25]), ("one-cycle", [1, 0.75, 0.25])):
        options = FitOptions(learning_rate=0.01, schedule=schedule)  # type: ignore[arg-type]
        assert [options.rate(step, 3) for step in range(3)] == pytest.approx([0.01 * share for share in wanted])
    rising = [FitOptions(schedule="one-cycle").rate(step, 100) for step in range(100)]
    assert rising[0] == pytest.approx(1e-3 / 15) and rising[:14] == sorted(rising[:14])
    assert rising[15:] == pytest.approx([FitOptions(schedule="cosine").rate(step, 100) for step in range(15, 100)])


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    options = FitOptions(epochs=2, accumulate=3)
    assert (options.steps_an_epoch(8), options.total_steps(8), FitOptions().total_steps(8)) == (3, 6, 8 * EPOCHS)
    seen: list[float] = []

    def loss(outputs: tuple[Tensor, ...], label: Tensor | None) -> Tensor:
        assert label is not None
        if torch.is_grad_enabled():
            seen.append(float(label))
        return outputs[0].square().mean()

    data: Feeds = [(feed, torch.tensor(float(index))) for index, feed in enumerate(feeds(10))]
    fit(program("mlp"), data, train=["first.*"], loss=loss, options=options)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8)) and seen[:8] != seen[8:]


def test_early_stop_returns_the_best_on_held_out_data() -> None:
    """Labels of the fitted samples lead away from those held out, so the first weights are the best."""
    data: Feeds = [(feed, torch.tensor(-1.0 if index < 8 else 1.0)) for index, feed in enumerate(feeds(10))]

    def loss(outputs: tuple[Tensor, ...], label: Tensor | None) -> Tensor:
        assert label is not None
        return (outputs[0] - label).square().mean()

    source = program("mlp")
    options = FitOptions(epochs=50, patience=3, learning_rate=0.01)
    result = fit(source, data, train=["second.bias"], loss=loss, options=options)
    assert (result.stopped_by, result.best_step) == ("patience", 0)
    assert [item.step for item in result.history] == [0, 8, 16, 24]
    assert torch.equal(tensors(result.program)["second.bias"], tensors(source)["second.bias"])
    turned: Feeds = [(feed, -label if index < 8 else label) for index, (feed, label) in enumerate(data)]
    result = fit(source, turned, train=["second.bias"], loss=loss, options=replace(options, epochs=6))
    assert (result.stopped_by, result.best_step) == ("steps", 48)


def test_digits_are_learned_from_labels() -> None:
    """Ten blurred prototypes of 8 x 8 with noise, as in handwritten digits."""
    prototypes = torch.rand(10, 64)
    labels = torch.arange(400) % 10
    images = prototypes[labels] + 0.35 * torch.randn(400, 64)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    source = graphopt.capture(module, (images[:4],), dynamic_shapes={"input": {0: "batch"}})
    data: Feeds = [({"input": images[i : i + 20]}, labels[i : i + 20]) for i in range(0, 400, 20)]
    options = FitOptions(learning_rate=5e-3, epochs=15, clip_norm=5.0, patience=5)
    result = fit(source, data, train=["*"], loss="cross-entropy", options=options)

    def accuracy(found: Program) -> float:
        return float((found(images[320:])[0].argmax(-1) == labels[320:]).float().mean())

    assert accuracy(source) < 0.4 and accuracy(result.program) > 0.9
    assert min(item.held_out for item in result.history) < 0.4 < 2.0 < result.history[0].held_out


def test_a_task_loss_beside_a_teacher() -> None:
    teacher = program("dict_output")
    data: Feeds = [({"x": torch.randn(3, 6)}, torch.tensor([0, 1, 2])) for _ in range(5)]
    weights = []
    for share in (1.0, 3.0):
        loss = Distillation("kl", ("logits",), 2.0, lambda outputs, label: outputs[0].square().mean(), share)
        options = FitOptions(steps=2, optimizer="sgd")
        result = fit(teacher, data, train=["layer.*"], loss=loss, teacher=teacher, options=options)
        weights.append(tensors(result.program)["layer.weight"])
    moved = [(weight - tensors(teacher)["layer.weight"]).norm() for weight in weights]
    assert float(moved[1]) > 2 * float(moved[0]) > 0


def test_features_are_matched_by_their_relative_square() -> None:
    teacher = program("dict_output")
    first, *others = (spec.name for spec in teacher.outputs if spec.dtype.is_floating_point)
    student = perturbed(teacher, "layer.weight")
    inputs = (torch.randn(3, 6),)
    objective = make_objective(student, Distillation("mse", (first,), features=tuple(others)), teacher)
    names = [spec.name for spec in teacher.outputs]
    ours, theirs = student(*inputs), teacher(*inputs)
    distances = []
    for name in (first, *others):
        one, other = ours[names.index(name)], theirs[names.index(name)]
        distances.append((one - other).square().mean() / (1 if name == first else other.square().mean()))
    expected = distances[0] + torch.stack(distances[1:]).mean()
    assert others and float(expected) > 0
    torch.testing.assert_close(objective(inputs, ours, None), expected)


def test_both_branches_of_a_condition_learn() -> None:
    teacher = program("branching")
    student = perturbed(perturbed(teacher, "large.2.weight"), "small.weight")
    data: Feeds = [{"x": torch.randn(3, 8) + sign} for _ in range(20) for sign in (0.5, -0.5)]
    options = FitOptions(epochs=3, learning_rate=0.03, weight_decay=0.01)
    result = fit(student, data, train=["large.2.weight", "small.weight"], teacher=teacher, options=options)
    assert result.history[-1].held_out < result.history[0].held_out / 3


def test_shared_weights_stay_shared() -> None:
    teacher = program("tied")
    data: Feeds = [{"ids": torch.randint(0, 20, (2, 5))} for _ in range(10)]
    options = FitOptions(epochs=3, learning_rate=0.01)
    result = fit(perturbed(teacher, "embed.weight"), data, train=["embed.weight"], teacher=teacher, options=options)
    assert [name for name, _ in result.program.graph_module.named_parameters()] == ["embed.weight"]
    assert result.best_step > 0


def test_state_starts_anew_for_every_sample() -> None:
    class Running(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x)
            return self.layer(self.total)

    source = graphopt.capture(Running(), (torch.randn(4),))
    before = source.state[0].initial.clone()
    result = fit(
        source, [{"x": torch.randn(4)}] * 5, train=["layer.*"], loss=lambda o, _: o[0].square().sum(),
        options=FitOptions(epochs=3),
    )  # fmt: skip
    assert torch.equal(source.state[0].initial, before) and result.best_step > 0


def test_estimators_train_what_has_no_slope() -> None:
    source = graphopt.capture(Gated(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    wanted = torch.tensor([0.0, 1.0, 1.0, 0.0])
    data: Feeds = [({"x": x}, x * wanted + x.round()) for x in torch.randn(25, 8, 4)]

    def loss(outputs: tuple[Tensor, ...], label: Tensor | None) -> Tensor:
        assert label is not None
        return (outputs[0] - label).square().mean()

    with pytest.raises(UsageError, match=r"'gate' gets no gradient: stopped by gt \(aten\.gt\.Scalar\); give an estim"):
        fit(source, data, train=["gate"], loss=loss)
    with pytest.raises(UsageError, match=r"'scale' gets no gradient: stopped by round_1 \(aten\.round\.default\)"):
        fit(source, data, train=["scale"], loss=loss)
    gate = {"gt": lambda x, threshold: straight_through_step(x - threshold)}
    options = FitOptions(learning_rate=0.05, epochs=2)
    result = fit(source, data, train=["gate"], loss=loss, estimators=gate, options=options)
    assert torch.equal((tensors(result.program)["gate"] > 0).float(), wanted)
    assert result.history[0].held_out > 0.4 and result.history[-1].held_out == 0
    wide = result.program.copy()
    set_attribute(wide.graph_module, "scale", nn.Parameter(torch.full((4,), 1.5)))
    rounding = {"round_1": straight_through_round}
    scaled = fit(wide, data, train=["scale"], loss=loss, estimators=rounding, options=options)
    assert min(item.held_out for item in scaled.history) < scaled.history[0].held_out / 3
    assert [node.target for node in result.program.nodes()] == [node.target for node in source.nodes()]
    with pytest.raises(UnknownNameError, match="unknown node 'gtt'; did you mean 'gt'"):
        fit(source, data, train=["gate"], loss=loss, estimators={"gtt": straight_through_step})


def test_sixteen_bit_weights_learn_small_changes() -> None:
    module = nn.Linear(4, 4, bias=False).bfloat16()
    source = graphopt.capture(module, (torch.randn(2, 4).bfloat16(),))
    data: Feeds = [{"input": torch.randn(2, 4)} for _ in range(10)]
    result = fit(
        source, data, train=["weight"], loss=lambda o, _: (o[0].float() - 3).square().mean(),
        options=FitOptions(learning_rate=1e-4, epochs=20),
    )  # fmt: skip
    weight = tensors(result.program)["weight"]
    assert weight.dtype is torch.bfloat16 and not torch.equal(weight, module.weight)


def test_a_listener_hears_loss_and_time_left() -> None:
    heard: list[tuple[str, int, int]] = []
    with told_to(lambda *at: heard.append(at)):
        fit(program("mlp"), feeds(5), train=["*"], teacher=program("mlp"), options=FitOptions(steps=3))
    assert [(done, total) for _, done, total in heard] == [(0, 3), (1, 3), (2, 3)]
    assert all("loss" in stage and "s left" in stage for stage, _, _ in heard)


def test_progress() -> None:
    seen: list[FitProgress] = []
    fit(program("mlp"), feeds(5), train=["*"], teacher=program("mlp"), progress=seen.append,
        options=FitOptions(epochs=2))  # fmt: skip
    assert [(item.step, item.steps) for item in seen] == [(step, 8) for step in range(1, 9)]
    assert seen[-1].seconds_left == 0 and all(item.seconds_left >= 0 for item in seen)
    assert str(seen[-1]) == "loss 0, held out 0, 0 s left"


def test_buffers_are_trained_under_their_full_name_only() -> None:
    source = program("tied")
    data: Feeds = [{"ids": torch.randint(0, 20, (2, 5))} for _ in range(5)]
    arguments: dict[str, Any] = {"loss": square, "options": FitOptions(steps=1)}
    assert fit(source, data, train=["*"], **arguments).trained == ("embed.weight",)
    result = fit(source, data, train=["rows"], **arguments)
    assert result.trained == ("rows",) and not isinstance(tensors(result.program)["rows"], nn.Parameter)
