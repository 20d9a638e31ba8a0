"""graphopt::dynamic_quantize: codes whose scale and zero point are those of the value itself.

The function here is the specification. Along `axis`, such as the features of a token, elements share one range, and
scale and zero point have the rank of x with size 1 there: what graphopt::dequantize takes with that axis and a block of
its size. Without an axis there is one range, and both have no axes.

Source: ONNX DynamicQuantizeLinear, opset 11, for each range on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError


@torch.library.custom_op(
    "graphopt::dynamic_quantize",
    mutates_args=(),
    schema="(Tensor x, *, int? axis=None) -> (Tensor, Tensor, Tensor)",
)
def dynamic_quantize(x: Tensor, *, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, x's shape), scale (x's type) and zero point (uint8) such that 0 and all elements have a code.

    scale = (max(x, 0) - min(x, 0)) / 255, 1 where that is 0; zero_point = round(-min / scale), codes =
    clamp(round(x / scale) + zero_point, 0, 255); halves round to even. x is float32 or float64; a range with
    infinities or NaN gives codes of no meaning. Raises UsageError for an axis that does not exist, and where a gradient
    is asked for.
    """
    _check(x, axis)
    low, high = _extremes(x, axis)
    width = high - low
    scale = torch.where(width > 0, width / 255, 1.0)
    zero = (-low / scale).clamp(0, 255).round()
    codes = ((x / scale).round() + zero).clamp(0, 255).nan_to_num(0.0)
    return codes.to(torch.uint8).contiguous(), scale, zero.nan_to_num(0.0).to(torch.uint8)


def _extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    if axis is None:
        low, high = x.aminmax()
    else:
        low, high = x.aminmax(dim=axis, keepdim=True)
    return low.clamp(max=0.0), high.clamp(min=0.0)


@dynamic_quantize.register_fake
def _(x: Tensor, *, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, axis)
    shape = [] if axis is None else [1 if number == axis else size for number, size in enumerate(x.shape)]
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


def _check(x: Tensor, axis: int | None) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"graphopt::dynamic_quantize takes float32 or float64, not {x.dtype}; cast it first")
    if axis is not None and not 0 <= axis < x.dim():
        raise UsageError(f"axis {axis} of a quantization does not exist among {x.dim()}")


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    if ctx.needs_input_grad[0]:
        raise UsageError(
            "no gradient passes through graphopt::dynamic_quantize, whose result is integers; train with the "
            "estimators of graphopt.gradient_estimators, or run under torch.no_grad()"
        )


def _no_gradient(ctx: Any, *gradients: Any) -> None:
    return None


dynamic_quantize.register_autograd(_no_gradient, setup_context=_refuse_gradient)
