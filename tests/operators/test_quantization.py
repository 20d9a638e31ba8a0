"""graphopt::quantize and graphopt::dequantize: the rules that the specification states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt.operators  # noqa: F401
from graphopt.errors import UsageError

quantize, dequantize = torch.ops.graphopt.quantize, torch.ops.graphopt.dequantize
UNSIGNED: dict[str, Any] = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}
SIGNED: dict[str, Any] = {"qmin": -128, "qmax": 127, "dtype": torch.int8}
NUMBERS: dict[str, Any] = {"qmin": -128, "qmax": 127, "dtype": torch.float32}


def test_halves_round_to_even_and_codes_saturate() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 2.6, 1e9, -1e9, float("inf"), -float("inf"), float("nan")])
    zero = torch.tensor(3, dtype=torch.uint8)
    assert quantize(x, torch.tensor(1.0), zero, **UNSIGNED).tolist() == [3, 5, 1, 6, 255, 0, 255, 0, 0]
    narrow = quantize(x, torch.tensor(1.0), None, qmin=-8, qmax=7, dtype=torch.int8)
    assert narrow.tolist() == [0, 2, -2, 3, 7, -8, 7, -8, -8]


def test_the_zero_point_is_added_after_rounding() -> None:
    """0.5 + 3 would round to 4."""
    zero = torch.tensor(3, dtype=torch.int8)
    assert quantize(torch.tensor(0.5), torch.tensor(1.0), zero, **SIGNED).item() == 3


def test_a_reciprocal_rounds_otherwise_than_a_quotient() -> None:
    x, scale = torch.arange(-300, 300) * torch.tensor(0.15), torch.tensor(0.3)
    exact, by_reciprocal = (quantize(x, scale, None, **SIGNED, reciprocal=r) for r in (False, True))
    assert torch.equal(exact.float(), (x / scale).round().clamp(-128, 127))
    assert torch.equal(by_reciprocal.float(), (x * (1 / scale)).round().clamp(-128, 127))
    assert not torch.equal(exact, by_reciprocal)


@pytest.mark.parametrize("block", [0, 1, 2, 3, 5, 7])
def test_parameters_along_an_axis_and_in_blocks(block: int) -> None:
    codes = torch.randint(-128, 128, (3, 5, 2), dtype=torch.int8)
    runs = -(-5 // block) if block else 5
    scale = torch.rand(3, runs, 2) + 0.1 if block else torch.rand(5) + 0.1
    zero = torch.randint(-5, 5, scale.shape, dtype=torch.int8)
    found = dequantize(codes, scale, zero, axis=1, block=block, **NUMBERS)
    for index in range(5):
        each = (slice(None), index // block) if block else (index,)
        wanted = (codes[:, index].float() - zero[each].float()) * scale[each]
        assert torch.equal(found[:, index], wanted)
    assert torch.equal(quantize(found, scale, zero, axis=1, block=block, **SIGNED), codes)


def test_differences_of_codes_are_exact_in_32_bits() -> None:
    codes, zero = torch.tensor([2**30 + 1], dtype=torch.int32), torch.tensor(2**30, dtype=torch.int32)
    assert dequantize(codes, torch.tensor(0.5), zero, qmin=-(2**31), qmax=2**31 - 1, dtype=torch.float32).item() == 0.5


@pytest.mark.parametrize("block", [0, 2])
def test_gradients_for_scales_and_floating_zero_points(block: int) -> None:
    codes = torch.randint(-9, 9, (4, 6), dtype=torch.int8)
    shape = (4, 3) if block else (6,)
    scale, zero = (torch.rand(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(scale: Tensor, zero: Tensor) -> Any:
        options = {**NUMBERS, "dtype": torch.float64}
        return dequantize(codes, scale, zero, axis=1, block=block, **options)

    assert torch.autograd.gradcheck(function, (scale, zero))


def test_a_gradient_through_codes_is_refused() -> None:
    with pytest.raises(UsageError, match="no gradient passes through"):
        quantize(torch.ones(2, requires_grad=True), torch.tensor(1.0), None, **SIGNED)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ((torch.ones(2, 3), torch.ones(2), None), {"axis": 1}, r"scale of .* has the shape \[2\] where \[3\]"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(1)), {"axis": 1}, "zero_point"),
        ((torch.ones(2, 3), torch.ones(1), None), {}, "scale"),
        ((torch.ones(2, 3), torch.tensor(1.0), None), {"block": 2}, "needs the axis"),
        ((torch.ones(2, 3), torch.ones(3), None), {"axis": 2}, "axis 2"),
        ((torch.ones(2, 3), torch.tensor(1.0), None), {"dtype": torch.int32}, "int32"),
        ((torch.ones(2, 3), torch.tensor(1.0), None), {"qmin": -129}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        quantize(*arguments, **{**SIGNED, **options})


def test_torch_accepts_the_definitions() -> None:
    """Schema, fake values and gradients, as torch.library checks them."""
    x, scale, zero = torch.rand(4, 5), torch.rand(4), torch.zeros(4, dtype=torch.int8)
    torch.library.opcheck(quantize.default, (x, scale, zero), {"axis": 0, **SIGNED})
    torch.library.opcheck(quantize.default, (x.t(), scale, None), {"axis": 1, **SIGNED})
    codes, learned = torch.ones(4, 5, dtype=torch.int8), scale.clone().requires_grad_()
    torch.library.opcheck(dequantize.default, (codes, learned, zero), {"axis": 0, **NUMBERS})
