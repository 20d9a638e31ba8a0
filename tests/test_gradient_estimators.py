"""Values, gradients against their formulas and against the slope of the surrogate, and what is left after capture."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import gradient_estimators as ge
from graphopt.errors import UsageError

Function = Callable[[Tensor], Tensor]

POINTS = torch.tensor([-4.0, -2.5, -1.2, -0.7, -0.3, 0.2, 0.6, 1.3, 2.2, 3.7], dtype=torch.float64)
SCALE = torch.tensor(0.5)
INCOMING = torch.linspace(-1, 2, len(POINTS), dtype=torch.float64)


def gradient(function: Function, x: Tensor, incoming: Tensor = INCOMING) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, incoming)[0]


def slope(surrogate: Function, x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences."""
    return (surrogate(x + step) - surrogate(x - step)) / (2 * step)


def step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


CASES: dict[str, tuple[Function, Function, Function]] = {  # estimator, forward value, surrogate
    "straight-through step": (ge.straight_through_step, step, lambda x: x),
    "clipped step": (lambda x: ge.clipped_step(x, 1.25), step, lambda x: x.clamp(-1.25, 1.25)),
    "sigmoid slope": (lambda x: ge.sigmoid_slope_step(x, 2.0), step, lambda x: torch.sigmoid(2 * x)),
    "hard sigmoid": (ge.hard_sigmoid_step, step, nn.functional.hardsigmoid),
    "hard sigmoid of width 1": (lambda x: ge.hard_sigmoid_step(x, 1.0), step, lambda x: ((x + 1) / 2).clamp(0, 1)),
    "straight-through round": (ge.straight_through_round, torch.round, lambda x: x),
    "clipped round": (lambda x: ge.clipped_round(x, -2, 3), lambda x: x.round().clamp(-2, 3), lambda x: x.clamp(-2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    estimator, value, surrogate = CASES[name]
    assert torch.equal(estimator(POINTS), value(POINTS))
    torch.testing.assert_close(gradient(estimator, POINTS), INCOMING * slope(surrogate, POINTS), rtol=1e-7, atol=1e-8)


def test_formulas() -> None:
    s = POINTS.sigmoid()
    expected = {
        ge.straight_through_step: torch.ones_like(POINTS),
        ge.clipped_step: (POINTS.abs() <= 1).double(),
        ge.sigmoid_slope_step: s * (1 - s),
        ge.hard_sigmoid_step: (POINTS.abs() <= 3).double() / 6,
        ge.straight_through_round: torch.ones_like(POINTS),
    }
    for estimator, factor in expected.items():
        torch.testing.assert_close(gradient(estimator, POINTS), INCOMING * factor, rtol=1e-14, atol=0)


def test_edges() -> None:
    edge = torch.tensor([-1.0, 0.0, 1.0, 1.0001])
    assert gradient(ge.clipped_step, edge, torch.ones(4)).tolist() == [1, 1, 1, 0]
    assert gradient(lambda x: ge.clipped_round(x, 0, 1), edge, torch.ones(4)).tolist() == [0, 1, 1, 0]
    assert ge.straight_through_step(torch.tensor([0.0, -0.0, math.nan])).tolist() == [0, 0, 0]
    assert ge.straight_through_round(torch.tensor([0.5, 1.5, 2.5])).tolist() == [0, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = POINTS.to(dtype)
    for estimator, _, _ in CASES.values():
        assert estimator(x).dtype is dtype
        assert gradient(estimator, x, torch.ones_like(x)).dtype is dtype


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 6)])
def test_learned_scale_follows_the_paper(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * 3
    incoming = torch.randn(4, 6, dtype=torch.float64)
    scale = (torch.rand(shape, dtype=torch.float64) + 0.3).requires_grad_()
    low, high = -4, 3
    leaf = x.clone().requires_grad_()
    result = ge.learned_scale_round(leaf, scale, low, high)
    for_x, for_scale = torch.autograd.grad(result, (leaf, scale), incoming)

    v = x / scale.detach()
    assert torch.equal(result.detach(), v.round().clamp(low, high) * scale.detach())
    assert torch.equal(for_x, incoming * ((v > low) & (v < high)))
    assert bool((v <= low).any()) and bool((v >= high).any())
    parts = torch.zeros_like(v)
    for index in [(i, j) for i in range(4) for j in range(6)]:
        value = float(v[index])
        parts[index] = low if value <= low else high if value >= high else round(value) - value
    shared = x.numel() / scale.numel()
    expected = (incoming * parts).sum_to_size(shape) / math.sqrt(shared * high)
    torch.testing.assert_close(for_scale, expected)


def test_learned_scale_is_the_slope_of_its_surrogate() -> None:
    """Between roundings the value is scale * (v + a constant): differences with the rounded part held fixed."""
    x = torch.randn(50, dtype=torch.float64)
    rounded = (x / 0.25).round() - x / 0.25

    def surrogate(scale: Tensor) -> Tensor:
        v = x / scale
        inside = (x / 0.25 > -8) & (x / 0.25 < 7)
        return torch.where(inside, v + rounded, v.clamp(-8, 7)).mul(scale).sum()

    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(ge.learned_scale_round(x, scale, -8, 7).sum(), scale)
    expected = slope(surrogate, torch.tensor(0.25, dtype=torch.float64)) / math.sqrt(50 * 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NOISY: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "binary concrete": lambda x, g: ge.binary_concrete(x, 0.7, generator=g),
    "gumbel softmax": lambda x, g: ge.gumbel_softmax(x, 0.7, generator=g),
    "hard concrete": lambda x, g: ge.hard_concrete(x, generator=g),
}
ROUNDED: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "bernoulli": lambda x, g: ge.bernoulli_step(x, generator=g),
    "hard binary concrete": lambda x, g: ge.binary_concrete(x, 0.7, hard=True, generator=g),
    "hard gumbel softmax": lambda x, g: ge.gumbel_softmax(x, 0.7, hard=True, generator=g),
}


@pytest.mark.parametrize("name", [*NOISY, *ROUNDED])
def test_noise_repeats_with_the_seed(name: str) -> None:
    function = {**NOISY, **ROUNDED}[name]
    x = torch.zeros(64)
    assert torch.equal(function(x, seeded()), function(x, seeded()))
    assert not torch.equal(function(x, seeded()), function(x, seeded(4)))


@pytest.mark.parametrize("name", NOISY)
def test_gradients_with_the_noise_held(name: str) -> None:
    function = NOISY[name]
    found = gradient(lambda x: function(x, seeded()), POINTS)
    columns = []
    for index in range(len(POINTS)):
        shift = torch.zeros_like(POINTS)
        shift[index] = 1e-6
        difference = function(POINTS + shift, seeded()) - function(POINTS - shift, seeded())
        columns.append((difference / 2e-6 * INCOMING).sum())
    torch.testing.assert_close(found, torch.stack(columns), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("hard", "soft"), [("hard binary concrete", "binary concrete"), ("hard gumbel softmax", "gumbel softmax")]
)
def test_hard_gates_have_the_gradient_of_soft_ones(hard: str, soft: str) -> None:
    value = ROUNDED[hard](POINTS, seeded())
    assert set(value.tolist()) <= {0.0, 1.0}
    softer = NOISY[soft](POINTS, seeded())
    expected = step(softer - 0.5) if "binary" in soft else step(softer - softer.max() + 1e-12)
    assert torch.equal(value, expected)
    found = gradient(lambda x: ROUNDED[hard](x, seeded()), POINTS)
    torch.testing.assert_close(found, gradient(lambda x: NOISY[soft](x, seeded()), POINTS), rtol=1e-10, atol=1e-12)


def test_bernoulli_is_right_on_average_and_has_the_slope_of_its_mean() -> None:
    x = torch.tensor(0.8, dtype=torch.float64)
    drawn = ge.bernoulli_step(x.expand(20000), generator=seeded())
    assert abs(float(drawn.mean()) - float(x.sigmoid())) < 0.015  # 4.6 standard deviations
    found = gradient(lambda v: ge.bernoulli_step(v, generator=seeded()), POINTS)
    torch.testing.assert_close(found, INCOMING * slope(torch.sigmoid, POINTS), rtol=1e-7, atol=1e-9)


def test_hard_concrete_closes_and_opens_as_often_as_it_says() -> None:
    log_alpha = torch.tensor(0.4, dtype=torch.float64)
    gates = ge.hard_concrete(log_alpha.expand(20000), generator=seeded())
    assert bool((gates == 1).any()) and float(gates.min()) >= 0 and float(gates.max()) <= 1
    probability = ge.hard_concrete_penalty(log_alpha)
    assert abs(float((gates > 0).double().mean()) - float(probability)) < 0.015
    torch.testing.assert_close(
        gradient(ge.hard_concrete_penalty, POINTS), INCOMING * slope(ge.hard_concrete_penalty, POINTS)
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gumbel_softmax_along_an_axis(axis: int) -> None:
    x = torch.randn(3, 4)
    for hard in (False, True):
        sums = ge.gumbel_softmax(x, 1.0, axis=axis, hard=hard).sum(axis)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    deployed = ge.gumbel_softmax(x, 1.0, axis=axis, training=False)
    assert torch.equal(deployed.argmax(axis), x.argmax(axis)) and float(deployed.sum()) == x.shape[1 - axis % 2]


class Estimated(nn.Module):
    """An estimator between two operators, with noise while training only."""

    def __init__(self, function: Callable[..., Tensor], noisy: bool) -> None:
        super().__init__()
        self.function = function
        self.noisy = noisy
        self.gate = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        options = {"training": self.training} if self.noisy else {}
        return x * self.function(x * self.gate, **options)


CAPTURED: dict[str, tuple[Callable[..., Tensor], bool, set[str]]] = {
    "straight_through_step": (ge.straight_through_step, False, {"gt", "_to_copy"}),
    "clipped_step": (ge.clipped_step, False, {"gt", "_to_copy"}),
    "sigmoid_slope_step": (ge.sigmoid_slope_step, False, {"gt", "_to_copy"}),
    "hard_sigmoid_step": (ge.hard_sigmoid_step, False, {"gt", "_to_copy"}),
    "straight_through_round": (ge.straight_through_round, False, {"round"}),
    "clipped_round": (lambda x: ge.clipped_round(x, -1, 1), False, {"round", "clamp"}),
    "learned_scale_round": (
        lambda x: ge.learned_scale_round(x, SCALE, -1, 1),
        False,
        {"div", "round", "clamp"},
    ),
    "bernoulli_step": (ge.bernoulli_step, True, {"gt", "_to_copy"}),
    "binary_concrete": (lambda x, training: ge.binary_concrete(x, 1.0, training=training), True, {"gt", "_to_copy"}),
    "gumbel_softmax": (
        lambda x, training: ge.gumbel_softmax(x, 1.0, training=training),
        True,
        {"argmax", "arange", "eq", "_to_copy", "permute", "movedim"},
    ),
    "hard_concrete": (
        lambda x, training: ge.hard_concrete(x, training=training),
        True,
        {"sigmoid", "add", "clamp"},
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_what_is_captured_is_plain_aten(name: str) -> None:
    function, noisy, allowed = CAPTURED[name]
    module = Estimated(function, noisy)
    x = torch.randn(3, 6)
    program = graphopt.capture(module, (x,), dynamic_shapes={"x": {0: "batch"}})
    targets = [str(node.target).split(".") for node in program.nodes() if node.op == "call_function"]
    assert {namespace for namespace, *_ in targets} == {"aten"}
    assert {name for _, name, *_ in targets} <= allowed | {"mul"}
    assert torch.equal(program(x)[0], module.eval()(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ge.clipped_step(POINTS, 0.0), "width=0.0 must be positive"),
        (lambda: ge.sigmoid_slope_step(POINTS, -1.0), "slope=-1.0 must be positive"),
        (lambda: ge.binary_concrete(POINTS, math.nan), "temperature=nan must be positive"),
        (lambda: ge.clipped_round(POINTS, 3, 3), "low=3 must be below high=3"),
        (lambda: ge.hard_concrete(POINTS, stretch=(0.0, 1.0)), "must begin below 0 and end above 1"),
    ],
)
def test_wrong_options(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()
