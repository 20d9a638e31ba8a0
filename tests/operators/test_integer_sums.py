"""graphopt::qsum against float64, and from quantized programs to kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.operators import integer_sums  # noqa: F401
from graphopt.passes.qdq_fusion import QDQFusion

ops = torch.ops.graphopt
STEP, INTO, ZERO = torch.tensor(0.05), torch.tensor(0.02), torch.tensor(117, dtype=torch.uint8)
BYTE: dict[str, Any] = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(("dim", "keepdim"), [([2, 3], False), ([2, 3], True), ([1], False), ([-1, 0], True)])
def test_means_and_sums(dtype: torch.dtype, dim: list[int], keepdim: bool) -> None:
    x, zero = codes(2, 5, 7, 9, dtype=dtype), torch.tensor(-3 if dtype == torch.int8 else 11, dtype=dtype)
    numbers = (x.double() - float(zero)) * STEP.double()
    count = x.numel() // x.sum(dim).numel()
    for divisor, wide in ((count, INTO), (1, torch.tensor(0.7))):
        found = ops.qsum(x, STEP, zero, wide, ZERO, dim=dim, keepdim=keepdim, divisor=divisor, **BYTE)
        steps = numbers.sum(dim, keepdim) / divisor / wide.double()
        wanted = (steps.round() + 117).clamp(0, 255)
        close = (steps - steps.floor() - 0.5).abs() < 1e-5 * steps.abs().clamp(min=1)
        assert torch.equal(found[~close].double(), wanted[~close])
        assert (found.double() - wanted).abs().max() <= 1


def test_halves_are_rounded_to_even_before_the_zero_point_is_added() -> None:
    """Sums 1, 2, 3, ... of steps of 1, of which two make one of the result."""
    x = torch.arange(8, dtype=torch.uint8)[:, None]
    one, two, odd = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(101, dtype=torch.uint8)
    found = ops.qsum(x, one, None, two, odd, dim=[1], **BYTE)
    assert found.tolist() == [101, 101, 102, 103, 103, 103, 104, 105]


def test_what_cannot_be_summed() -> None:
    with pytest.raises(UsageError, match=r"8 bits, not torch\.float32"):
        ops.qsum(torch.ones(3), STEP, None, INTO, ZERO, dim=[0], **BYTE)
    with pytest.raises(UsageError, match="divisor=0"):
        ops.qsum(codes(3), STEP, None, INTO, ZERO, dim=[0], divisor=0, **BYTE)


class Pooled(nn.Module):
    """Codes of a mean, a sum and a global average pool of codes."""

    step: Tensor
    into: Tensor
    wide: Tensor
    zero: Tensor

    def __init__(self, read_twice: bool = False) -> None:
        super().__init__()
        self.read_twice = read_twice
        for name, value in (
            ("step", STEP),
            ("into", torch.tensor(0.0213)),
            ("wide", torch.tensor(0.931)),
            ("zero", ZERO),
        ):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        y = ops.dequantize(ops.quantize(x, self.step, self.zero, **BYTE), self.step, self.zero, qmin=0, qmax=255,
                           dtype=torch.float32)  # fmt: skip
        mean, total = y.mean((2, 3)), y.sum((1,), keepdim=True)
        pooled = nn.functional.adaptive_avg_pool2d(y, 1)
        found = [
            ops.quantize(mean, self.into, self.zero, **BYTE),
            ops.quantize(total, self.wide, self.zero, **BYTE),
            ops.quantize(pooled, self.into, self.zero, **BYTE),
        ]
        return (*found, mean) if self.read_twice else tuple(found)


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v4-vnni"])
def test_from_a_quantized_program_to_kernels(target: str) -> None:
    x = torch.randn(2, 19, 6, 7, generator=torch.Generator().manual_seed(1)) * 3
    program = graphopt.capture(Pooled(), (x,))
    result = QDQFusion(fail_on_fallback=True).run(program, PassContext())
    targets = [str(node.target) for node in result.program.nodes()]
    assert targets.count("graphopt.qsum.default") == 3 and "graphopt.dequantize.default" not in targets
    assert "1 conversions are left, 0 at a fallback: 1 x the program's input" in result.notes[-1]
    for found, wanted in zip(result.program(x), program(x), strict=True):
        assert (found.int() - wanted.int()).abs().max() <= 1 and (found != wanted).float().mean() < 0.01
    session = graphopt.compile(result.program, target=target, threads=2).session()
    for array, wanted in zip(session.run(None, {"x": x.numpy()}), result.program(x), strict=True):
        assert torch.equal(torch.from_numpy(array), wanted)


def test_a_mean_that_is_read_as_numbers_stays() -> None:
    program = graphopt.capture(Pooled(read_twice=True), (torch.randn(2, 19, 6, 7),))
    result = QDQFusion().run(program, PassContext())
    targets = [str(node.target) for node in result.program.nodes()]
    assert targets.count("graphopt.qsum.default") == 2 and "aten.mean.dim" in targets
