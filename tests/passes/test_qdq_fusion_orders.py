"""What compares codes, averages windows of them, or divides one by another: against the program, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext, PassResult
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.program import Program

F = nn.functional
ops = torch.ops.graphopt
BYTE: dict[str, Any] = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}
HALVES = {"step": 0.5, "fine": 0.25, "wide": 2.0}  # most numbers lie on halves of a step
USUAL = {"step": 0.05, "fine": 0.011, "wide": 0.3}


class Quantized(nn.Module):
    """A function of numbers and of what quantizes them."""

    zero: Tensor
    number: Tensor
    images: Tensor

    def __init__(self, function: Callable[..., Any], steps: dict[str, float] = USUAL, zero: int = 121) -> None:
        super().__init__()
        self.function = function
        for name, step in steps.items():
            self.register_buffer(name, torch.tensor(step))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.uint8))
        self.register_buffer("number", torch.linspace(-3, 3, 24))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)

    def q(self, x: Tensor, step: str = "step", **options: Any) -> Tensor:
        result: Tensor = ops.quantize(x, getattr(self, step), self.zero, **{**BYTE, **options})
        return result

    def d(self, x: Tensor, step: str = "step") -> Tensor:
        given = {**BYTE, "dtype": torch.float32}
        result: Tensor = ops.dequantize(x, getattr(self, step), self.zero, **given)
        return result

    def qd(self, x: Tensor, step: str = "step") -> Tensor:
        return self.d(self.q(x, step), step)


def fused(module: nn.Module, *inputs: Tensor, apart: int = 0) -> tuple[list[str], PassResult]:
    """The operators after the pass; results, in PyTorch and compiled, are `apart` at most."""
    program = graphopt.capture(module, inputs)
    result = QDQFusion().run(program, PassContext())
    wanted, found = program(*inputs), result.program(*inputs)
    session = graphopt.compile(result.program, threads=2).session()
    feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    for a, b, array in zip(wanted, found, session.run(None, feed), strict=True):
        assert torch.equal(b, torch.from_numpy(array))
        assert (a.double() - b.double()).abs().max() <= apart and (a != b).double().mean() < 0.2
    return names(result.program), result


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("steps", [USUAL, HALVES])
def test_extremes_of_two_are_exact(steps: dict[str, float]) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        a, b = m.qd(x), m.qd(x.flip(0), "fine")
        same = m.q(torch.maximum(a, m.qd(x.flip(1))))
        other = m.q(torch.minimum(a, b), "wide"), m.q(torch.max(a, m.number), "fine")
        return same, *other, m.q(torch.minimum(m.qd(m.number, "wide"), b), "fine")

    found, result = fused(Quantized(run, steps), draw(5, 24))
    assert "graphopt.dequantize" not in found and "0 at a fallback" in result.notes[-1]


def test_every_code_of_both_sides_of_an_extreme() -> None:
    every = torch.arange(256).to(torch.uint8)

    class Pairs(Quantized):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            return self.q(torch.maximum(self.d(a), self.d(b, "wide")), "fine")

    found, _ = fused(Pairs(lambda: None, HALVES), every[:, None].clone(), every[None].clone())
    assert "graphopt.dequantize" not in found


def test_a_constant_that_is_no_number_is_not_compared_as_a_code() -> None:
    module = Quantized(lambda m, x: m.q(torch.maximum(m.qd(x), m.number)))
    module.number[3] = float("nan")
    program = graphopt.capture(module, (draw(5, 24),))
    result = QDQFusion().run(program, PassContext())
    assert "aten.maximum" in names(result.program) and torch.equal(
        program(draw(5, 24))[0], result.program(draw(5, 24))[0]
    )


def test_positions_of_codes() -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        y = m.qd(x, "wide")  # few codes, so that most places hold equal ones
        largest, where = y.max(0)
        ordered, at = torch.sort(y, stable=True, dim=0, descending=True)
        read = m.q(largest, "wide"), where, m.q(ordered, "wide"), at
        return *read, y.argmax(1), y.argmin(0), m.q(torch.sort(y).values, "wide"), y.argmax()

    found, result = fused(Quantized(run), draw(6, 40))
    assert "graphopt.dequantize" not in found and "0 at a fallback" in result.notes[-1]


@pytest.mark.parametrize("options", [{"k": 3}, {"k": 30, "largest": False}, {"k": 9, "dim": 0}])
def test_the_largest_and_where_they_are(options: dict[str, Any]) -> None:
    """Of equal ones PyTorch takes the same as numbers and as codes, not the first; numbers are dequantized behind."""
    x = draw(300, 40).abs()
    program = graphopt.capture(Quantized(lambda m, x: torch.topk(m.qd(x, "wide"), **options)), (x,))
    after = QDQFusion().run(program, PassContext()).program
    assert names(after).index("aten.topk") < names(after).index("graphopt.dequantize")
    assert all(torch.equal(a, b) for a, b in zip(program(x), after(x), strict=True))


@pytest.mark.parametrize(
    ("run", "steps", "reason"),
    [
        (lambda m, x: torch.sort(m.qd(x)), USUAL, "it is not stable"),
        (lambda m, x: m.qd(x).argmax(1), {**USUAL, "step": 3e38}, "stand for one number"),
        (lambda m, x: m.q(F.adaptive_avg_pool2d(m.qd(x)[None, None], 4)), USUAL, "windows are not of one size"),
        (lambda m, x: m.q(torch.relu(m.qd(x) / m.qd(x, "fine"))), USUAL, "may be 0 / 0"),
        (lambda m, x: m.q(F.avg_pool2d(m.qd(x)[None], 3)), USUAL, "no batch axis"),
        (lambda m, x: m.q(F.avg_pool1d(m.qd(x), 3, 2, 1, True)), USUAL, "no batch axis"),
        (
            lambda m, x: m.q(F.avg_pool2d(m.qd(x)[None, None], 3, 2, 1, ceil_mode=True)),
            USUAL,
            "divide by the padding that they cover",
        ),
    ],
)
def test_what_is_left_is_listed(run: Any, steps: dict[str, float], reason: str) -> None:
    x = draw(6, 41)
    program = graphopt.capture(Quantized(run, steps), (x,))
    result = QDQFusion().run(program, PassContext())
    assert any(reason in item.reason for item in result.declined), result.declined
    assert all(torch.equal(a, b) for a, b in zip(program(x), result.program(x), strict=True))


WINDOWS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (lambda x: F.avg_pool2d(x, 3, 2), (2, 17, 9, 11)),
    (lambda x: F.avg_pool2d(x, (3, 2), (1, 2), (1, 0)), (2, 64, 9, 11)),
    (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (2, 20, 9, 11)),
    (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), (1, 3, 8, 10)),
    (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 33, 8, 10)),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (1, 16, 8, 10)),
    (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), (2, 24, 8, 10)),
    (lambda x: F.avg_pool1d(x, 4, 2, 1), (2, 19, 30)),
    (lambda x: F.avg_pool1d(x, 4, 2, 1, count_include_pad=False), (2, 19, 30)),
    (lambda x: F.adaptive_avg_pool1d(x, 6), (2, 19, 30)),
    (lambda x: F.avg_pool3d(x, 2, 2, 1), (1, 5, 6, 7, 8)),
]


@pytest.mark.parametrize("number", range(len(WINDOWS)))
def test_means_of_windows(number: int) -> None:
    """With steps of powers of two sums of four or eight codes lie on halves, which both round to even."""
    pool, shape = WINDOWS[number]

    def run(m: Quantized, x: Tensor) -> Any:
        return m.q(pool(m.qd(x)), "fine"), m.q(pool(m.qd(x, "wide")), "wide", qmin=3, qmax=130)

    for steps in (USUAL, HALVES):
        found, result = fused(Quantized(run, steps, 0 if number % 2 else 121), draw(*shape), apart=1)
        assert found.count("graphopt.qavg_pool") == 2 and "graphopt.dequantize" not in found
        assert "0 at a fallback" in result.notes[-1]


@pytest.mark.parametrize("kind, zero", [(torch.uint8, 3), (torch.int8, -5), (torch.int8, 127)])
def test_sums_of_windows_begin_at_zero(kind: torch.dtype, zero: int) -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.tensor(0.5))
            self.register_buffer("zero", torch.tensor(zero, dtype=kind))

        def forward(self, x: Tensor) -> Any:
            least = torch.iinfo(kind).min
            window = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "divisor": 4}
            given = {**window, "qmin": least, "qmax": least + 255, "dtype": kind}
            return ops.qavg_pool(x, self.step, self.zero, self.step, self.zero, **given)

    x = torch.arange(256).to(torch.uint8).view(kind).view(1, 4, 8, 8).transpose(1, 3).contiguous()
    program = graphopt.capture(Means(), (x,))
    (found,) = graphopt.compile(program, threads=2).session().run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), *program(x))


def test_quotients_of_every_pair_of_codes() -> None:
    every = torch.arange(256).to(torch.uint8)

    class Quotients(Quantized):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            return self.q(self.d(a) / self.d(b, "fine"), "wide"), self.q(
                self.d(a) / self.d(b), "fine", qmin=3, qmax=201
            )

    for steps, zero in ((USUAL, 121), (HALVES, 7)):
        found, _ = fused(Quotients(lambda: None, steps, zero), every[:, None].clone(), every[None].clone(), apart=1)
        assert found == ["graphopt.qdiv", "graphopt.qdiv"]
