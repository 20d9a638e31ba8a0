"""graphopt::qlinear and graphopt::qconv: products of 8-bit codes with exact sums, then numbers or codes again.

The functions here are the specification. x holds uint8 or int8 codes with one scale and zero point, `weight` int8 codes
whose zero point is 0, with one scale or one for each output. Codes of weights less a zero point other than 0 may not
fit int8: `weight` is int16 then, from -255 to 255, and those of one output lie at most 255 apart. Sums of
(x - x_zero_point) * weight are int32 and exact; with more than 65,793 products, which 8 bits could take beyond it, they
wrap around. An int32 `bias` counts in steps of x_scale * weight_scale and is added to them; a float32 one is added to
the numbers.

`requantization` says what becomes of the sums. `residual` holds codes, uint8 or int8, of what is added, with a scale
and zero point of its own. Scales are float32, zero points of the type of their codes; shape () unless said otherwise.
No gradient passes through: the operators refuse it.

Source: ONNX QLinearConv and QLinearMatMul, with an epilogue in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import UsageError
from graphopt.operators.requantization import Factors, Requantization, requantized

_OPERANDS = (
    "Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? scale, Tensor? zero_point, Tensor? residual, Tensor? residual_scale, Tensor? residual_zero_point"
)
_RESULT = "str? activation=None, int qmin=0, int qmax=255, ScalarType dtype, bool reciprocal=False"


@torch.library.custom_op("graphopt::qlinear", mutates_args=(), schema=f"({_OPERANDS}, *, {_RESULT}) -> Tensor")
def qlinear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    *,
    activation: str | None = None,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
    reciprocal: bool = False,
) -> Tensor:
    """x [..., K] times weight [N, K]: [..., N] codes of `dtype`, or numbers of it where there is no `scale`.

    weight_scale () or [N], bias [N], residual [..., N]. Raises UsageError for operands that do not fit.
    """
    into = Requantization(scale, zero_point, activation, qmin, qmax, dtype, reciprocal)
    _check(x, weight, weight_scale, residual, residual_scale, into)
    check_range(weight)
    sums = _centered(x, x_zero_point) @ weight.double().t()
    factors = Factors.of(x_scale, weight_scale, bias, residual_scale, into)
    return requantized(_whole(sums, bias, -1), factors, residual, _zero(residual_zero_point), into, -1)


@qlinear.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, residual: Tensor | None,
    residual_scale: Tensor | None, residual_zero_point: Tensor | None, *, activation: str | None = None,
    qmin: int = 0, qmax: int = 255, dtype: torch.dtype, reciprocal: bool = False,
) -> Tensor:  # fmt: skip
    into = Requantization(scale, zero_point, activation, qmin, qmax, dtype, reciprocal)
    _check(x, weight, weight_scale, residual, residual_scale, into)
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"rows of {x.shape[-1]} codes do not fit a weight of {list(weight.shape)}")
    return x.new_empty([*x.shape[:-1], weight.shape[0]], dtype=dtype)


@torch.library.custom_op(
    "graphopt::qconv",
    mutates_args=(),
    schema=f"({_OPERANDS}, *, int[] stride, int[] padding, int[] dilation, int groups=1, {_RESULT}) -> Tensor",
)
def qconv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str | None = None,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
    reciprocal: bool = False,
) -> Tensor:
    """x [N, C, H, W] by weight [O, C / groups, KH, KW]: [N, O, OH, OW] as `qlinear`; what is padded stands for 0.

    weight_scale () or [O], bias [O], residual [N, O, OH, OW]; stride, padding and dilation give two numbers each,
    padding also four: above, left, below, right. Raises UsageError for operands that do not fit.
    """
    into = Requantization(scale, zero_point, activation, qmin, qmax, dtype, reciprocal)
    _check(x, weight, weight_scale, residual, residual_scale, into)
    check_range(weight)
    sums = _convolved(_centered(x, x_zero_point), weight.double(), stride, padding, dilation, groups)
    factors = Factors.of(x_scale, weight_scale, bias, residual_scale, into)
    return requantized(_whole(sums, bias, 1), factors, residual, _zero(residual_zero_point), into, 1)


@qconv.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, residual: Tensor | None,
    residual_scale: Tensor | None, residual_zero_point: Tensor | None, *, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int = 1, activation: str | None = None,
    qmin: int = 0, qmax: int = 255, dtype: torch.dtype, reciprocal: bool = False,
) -> Tensor:  # fmt: skip
    into = Requantization(scale, zero_point, activation, qmin, qmax, dtype, reciprocal)
    _check(x, weight, weight_scale, residual, residual_scale, into)
    if x.shape[1] != weight.shape[1] * groups:
        raise UsageError(f"{groups} groups of {weight.shape[1]} channels do not fit {x.shape[1]} of the input")
    above, left, below, right = _on_each_side(padding)
    sizes = [
        (size + around - step * (taps - 1) - 1) // by + 1
        for size, around, step, taps, by in zip(
            x.shape[2:], (above + below, left + right), dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=dtype)


def _convolved(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    above, left, below, right = _on_each_side(padding)
    wide = F.pad(x, (left, right, above, below))
    return F.conv2d(wide, weight, None, list(stride), 0, list(dilation), groups)


def _on_each_side(padding: Sequence[int]) -> Sequence[int]:
    """Above, left, below and right."""
    return (*padding, *padding) if len(padding) == 2 else padding


def _check(
    x: Tensor, weight: Tensor, weight_scale: Tensor, residual: Tensor | None, residual_scale: Tensor | None,
    into: Requantization,
) -> None:  # fmt: skip
    into.check()
    check_type(weight)
    for codes in (x, residual):
        if codes is not None and codes.dtype not in (torch.uint8, torch.int8):
            raise UsageError(f"integer products take codes of 8 bits, not {codes.dtype}")
    if weight_scale.ndim > 1 or (weight_scale.ndim == 1 and weight_scale.shape[0] != weight.shape[0]):
        raise UsageError(f"scales of shape {list(weight_scale.shape)} do not fit {weight.shape[0]} outputs")
    if (residual is None) != (residual_scale is None):
        raise UsageError("a residual and its scale belong together; give both or none")


def check_type(weight: Tensor) -> None:
    """Raise UsageError for a weight of another type than products of codes take."""
    if weight.dtype not in (torch.int8, torch.int16):
        raise UsageError(
            f"weights of integer products are int8 codes with the zero point 0, or int16, not {weight.dtype}"
        )


def check_range(weight: Tensor) -> None:
    """Raise UsageError for int16 that are no 8-bit codes less a zero point for each output."""
    if weight.dtype == torch.int8 or not weight.numel():
        return
    low, high = weight.flatten(1).int().aminmax(dim=1)
    if int(low.min()) < -255 or int(high.max()) > 255 or int((high - low).max()) > 255:
        raise UsageError(
            "int16 weights of integer products are 8-bit codes less a zero point for each output: give numbers from "
            "-255 to 255, at most 255 apart in one output"
        )


def _centered(x: Tensor, zero_point: Tensor | None) -> Tensor:
    """float64, in which sums of products of codes are exact in any order."""
    return x.double() - _zero(zero_point)


def _zero(zero_point: Tensor | None) -> int:
    return 0 if zero_point is None else int(zero_point)


def _whole(sums: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Sums and an int32 bias as int32, wrapped around."""
    total = sums.to(torch.int64)
    if bias is not None and not bias.is_floating_point():
        shape = [-1 if number == axis % total.ndim else 1 for number in range(total.ndim)]
        total = total + bias.reshape(shape)
    return total.to(torch.int32)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through products of integers; train before qdq-fusion, or run under torch.no_grad()"
        )


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * 11


qlinear.register_autograd(_no_gradient, setup_context=_refuse_gradient)
qconv.register_autograd(_no_gradient, setup_context=_refuse_gradient)
