"""graphopt::quantize and graphopt::dequantize: between numbers and the codes that stand for them.

The functions here are the specification. A number is (code - zero_point) * scale. `scale` and `zero_point`, which is
zero where it is left out, have one shape:

- `axis` is None: shape (), one pair for the whole tensor;
- `block` is 0: shape (x.shape[axis],), one pair for each index along `axis`;
- otherwise the rank of x: x's shape with ceil(x.shape[axis] / block) at `axis`, one pair for each run of `block`.

Source: ONNX QuantizeLinear and DequantizeLinear, opset 21. float16 and bfloat16 are computed in float32, as in ONNX
Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError

CODES: dict[torch.dtype, tuple[int, int]] = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "graphopt::quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor? zero_point, *, int? axis=None, int block=0, int qmin, int qmax, "
    "ScalarType dtype, bool reciprocal=False) -> Tensor",
)
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    axis: int | None = None,
    block: int = 0,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    reciprocal: bool = False,
) -> Tensor:
    """clamp(round(x / scale) + zero_point, qmin, qmax) as `dtype`: uint8, int8 or int16; halves round to even.

    `reciprocal`: x * (1 / scale) instead of the quotient, which may round to the other side of a half. NaN becomes
    qmin. Raises UsageError for parameters that do not fit x, and where a gradient for x is asked for: none passes
    through integers.
    """
    check_parameters(x, scale, zero_point, axis, block)
    _check_codes(qmin, qmax, dtype)
    compute = computed_in(x.dtype)
    steps = spread(scale, x, axis, block).to(compute)
    value = x.to(compute)
    whole = torch.round(value * steps.reciprocal() if reciprocal else value / steps)
    if zero_point is not None:
        whole = whole + spread(zero_point, x, axis, block)
    whole = torch.where(whole > qmin, whole, qmin).clamp(max=qmax)
    return whole.to(dtype).contiguous()


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    axis: int | None = None,
    block: int = 0,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    reciprocal: bool = False,
) -> Tensor:
    check_parameters(x, scale, zero_point, axis, block)
    _check_codes(qmin, qmax, dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op(
    "graphopt::dequantize",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor? zero_point, *, int? axis=None, int block=0, int qmin, int qmax, "
    "ScalarType dtype) -> Tensor",
)
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    axis: int | None = None,
    block: int = 0,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """(x - zero_point) * scale as `dtype`, a floating type; x holds integers from qmin to qmax.

    The difference is exact, in int32, unless the zero point is a floating number. The bounds say how many bits of a
    code are used; they change no result. The gradient for `scale` is exact. Raises UsageError for parameters that do
    not fit x.
    """
    check_parameters(x, scale, zero_point, axis, block)
    compute = computed_in(dtype)
    steps = spread(scale, x, axis, block).to(compute)
    return (_difference(x, zero_point, axis, block, compute) * steps).to(dtype).contiguous()


@dequantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    axis: int | None = None,
    block: int = 0,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    check_parameters(x, scale, zero_point, axis, block)
    return x.new_empty(x.shape, dtype=dtype)


def _difference(x: Tensor, zero_point: Tensor | None, axis: int | None, block: int, compute: torch.dtype) -> Tensor:
    if zero_point is None:
        return x.to(compute)
    zero = spread(zero_point, x, axis, block)
    if zero.is_floating_point():
        return x.to(compute) - zero.to(compute)
    return (x.to(torch.int32) - zero.to(torch.int32)).to(compute)


def spread(parameter: Tensor, x: Tensor, axis: int | None, block: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts against x."""
    if axis is None:
        return parameter
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(along(axis, x.ndim))


def along(axis: int, rank: int) -> list[int]:
    """The shape, with one -1, of a vector along one of `rank` axes."""
    return [-1 if number == axis else 1 for number in range(rank)]


def check_parameters(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, block: int) -> None:
    """Raise UsageError where scale and zero point have not the shape that `axis` and `block` ask for."""
    if axis is None and block:
        raise UsageError("quantization in blocks needs the axis that they divide")
    if axis is not None and not 0 <= axis < x.ndim:
        raise UsageError(f"axis {axis} of a quantization does not exist among {x.ndim}")
    wanted: Sequence[Any] = ()
    if axis is not None:
        runs = (x.shape[axis] + block - 1) // block if block else x.shape[axis]
        wanted = [*x.shape[:axis], runs, *x.shape[axis + 1 :]] if block else [runs]
    for what, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None and not _same(value.shape, wanted):
            shapes = f"{list(value.shape)} where {list(wanted)} is needed"
            raise UsageError(f"the {what} of a quantization of {list(x.shape)} has the shape {shapes}")


def _same(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(shape) == len(wanted) and all(a == b for a, b in zip(shape, wanted, strict=True))


def _check_codes(qmin: int, qmax: int, dtype: torch.dtype) -> None:
    if dtype not in (torch.uint8, torch.int8, torch.int16):
        raise UsageError(f"graphopt::quantize writes uint8, int8 or int16, not {dtype}; cast the codes afterwards")
    low, high = CODES[dtype]
    if not low <= qmin <= qmax <= high:
        raise UsageError(f"codes from {qmin} to {qmax} do not fit {dtype}")


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    if ctx.needs_input_grad[0]:
        raise UsageError(
            "no gradient passes through graphopt::quantize, whose result is integers; train with the estimators of "
            "graphopt.gradient_estimators, or run under torch.no_grad()"
        )


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
    return None, None, None


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, scale, zero_point = inputs
    ctx.save_for_backward(x, scale, zero_point)
    ctx.axis, ctx.block = keyword_only_inputs["axis"], keyword_only_inputs["block"]


def _scale_gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
    """Of (x - z) s: the sums of g (x - z) for s, and of -g s for a floating z, over what shares them."""
    x, scale, zero_point = ctx.saved_tensors
    compute = computed_in(grad.dtype)
    with torch.enable_grad():
        steps = scale.detach().to(compute).requires_grad_()
        floating = zero_point is not None and zero_point.is_floating_point()
        zero = zero_point.detach().to(compute).requires_grad_() if floating else zero_point
        difference = _difference(x, zero, ctx.axis, ctx.block, compute)
        value = difference * spread(steps, x, ctx.axis, ctx.block)
    wanted = [steps, zero] if floating else [steps]
    found = [g.to(scale.dtype) for g in torch.autograd.grad(value, wanted, grad.to(compute))]
    return None, found[0], found[1] if floating else None


quantize.register_autograd(_no_gradient, setup_context=_refuse_gradient)
dequantize.register_autograd(_scale_gradient, setup_context=_keep_codes)
