"""What follows the sums of an integer product: numbers, then codes again. Shared by `qlinear` and `qconv`.

`total` is int32, exact. With p = x_scale * weight_scale the number it stands for, with a residual, is

    number = total * p + bias + (residual - residual_zero) * residual_scale

in float32, or float64 where the scales are, each multiply-add rounded once. An `activation` is a function of the
number. Codes are clamp(round(number / scale) + zero, qmin, qmax), halves round to even; where there is no activation
the quotient is taken of the constants instead, in float64, so that round(total * (p / scale) + ...) costs no division.
A clip is no activation: it is a narrower qmin and qmax.

Against float32 arithmetic on dequantized operands a code differs by at most one, and only where the value before
rounding is within float32's error of a half (B. Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018, section 2.2, with a float multiplier).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import UsageError
from graphopt.operators.quantization import CODES, computed_in

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


@dataclass(frozen=True)
class Requantization:
    """How sums become the result: codes of `dtype` from qmin to qmax, or numbers of it, which `scale` is None for.

    `reciprocal`: the rounding dialect of what stands behind an activation, x * (1 / scale) instead of x / scale.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    activation: str | None
    qmin: int
    qmax: int
    dtype: torch.dtype
    reciprocal: bool

    def check(self) -> None:
        """Raises UsageError for an activation that does not exist, or codes that do not fit their type."""
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise UsageError(f"there is no activation {self.activation!r}; use one of {', '.join(ACTIVATIONS)}")
        if self.scale is None:
            if not self.dtype.is_floating_point:
                raise UsageError(f"sums without a scale become numbers, not {self.dtype}; give the scale of the codes")
            return
        low, high = CODES.get(self.dtype, (0, -1))
        if self.dtype not in (torch.uint8, torch.int8) or not low <= self.qmin <= self.qmax <= high:
            raise UsageError(f"codes from {self.qmin} to {self.qmax} of {self.dtype} are not 8 bits")

    @property
    def zero(self) -> int:
        return 0 if self.zero_point is None else int(self.zero_point)


@dataclass(frozen=True)
class Factors:
    """The constants of a number, or of a number in steps of the result's scale; `bias` None where it is int32
    or missing."""

    product: Tensor
    bias: Tensor | None
    residual: Tensor | None

    @staticmethod
    def of(
        x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, residual_scale: Tensor | None, into: Requantization
    ) -> Factors:
        compute = computed_in(x_scale.dtype)
        step = 1.0 if into.scale is None or into.activation else into.scale.double()
        floating = bias is not None and bias.is_floating_point()
        return Factors(
            (x_scale.double() * weight_scale.double() / step).to(compute),
            (bias.double() / step).to(compute) if bias is not None and floating else None,
            None if residual_scale is None else (residual_scale.double() / step).to(compute),
        )


def requantized(
    total: Tensor, factors: Factors, residual: Tensor | None, residual_zero: int, into: Requantization, axis: int
) -> Tensor:
    """The specification: `total` int32 with the bias, where that is int32; constants lie along `axis`."""
    shape = [-1 if number == axis % total.ndim else 1 for number in range(total.ndim)]

    def along(values: Tensor) -> Tensor:
        return values.reshape(shape) if values.ndim else values

    compute = factors.product.dtype
    number = total.to(compute)
    if factors.bias is None:
        number = number * along(factors.product)
    else:
        number = multiply_add(number, along(factors.product), along(factors.bias))
    if residual is not None and factors.residual is not None:
        added = (residual.to(torch.int32) - residual_zero).to(compute)
        number = multiply_add(added, factors.residual, number)
    if into.activation is not None:
        number = ACTIVATIONS[into.activation](number)
    if into.scale is None:
        return number.to(into.dtype)
    if into.activation is not None:
        scale = into.scale.to(compute)
        number = number * scale.reciprocal() if into.reciprocal else number / scale
    return codes_of(number, into)


def codes_of(number: Tensor, into: Requantization) -> Tensor:
    """Numbers in steps of the result's scale as codes."""
    whole = torch.round(number) + into.zero
    return torch.where(whole > into.qmin, whole, into.qmin).clamp(max=into.qmax).to(into.dtype)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once, as an FMA instruction does: the product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).to(c.dtype)
