"""graphopt::dynamic_qlinear and dynamic_qconv: products of 8-bit codes whose scale and zero point are computed too.

The functions here are the specification. x holds uint8 or int8 codes with one scale and zero point, of no axes, or one
for each row, of x's shape with a last axis of 1: what graphopt::dynamic_quantize gives. `weight` holds int8 codes whose
zero point is 0, or int16 as in `integer_products`, with a float32 scale or one for each output. Sums are as there:
int32, exact, wrapped around. The number is then

    total * (x_scale * weight_scale) + bias

in float32, the product of the scales rounded first, the multiply-add once. No gradient passes through.

Source: ONNX MatMulInteger and ConvInteger, behind which quantize_dynamic of ONNX Runtime writes Cast, Mul and Add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import UsageError
from graphopt.operators.integer_products import check_range, check_type
from graphopt.operators.requantization import multiply_add


@torch.library.custom_op(
    "graphopt::dynamic_qlinear",
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias) "
    "-> Tensor",
)
def dynamic_qlinear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x [..., K] times weight [N, K]: [..., N] float32.

    x_scale float32 and x_zero_point of x's type, () or [..., 1]; weight_scale () or [N], bias float32 [N]. Raises
    UsageError for operands that do not fit.
    """
    _check(x, x_scale, x_zero_point, weight, weight_scale)
    check_range(weight)
    centered = x.to(torch.int32) - x_zero_point.to(torch.int32)
    total = (centered.double() @ weight.double().t()).to(torch.int64).to(torch.int32)
    factor = x_scale * weight_scale
    number = total.to(torch.float32)
    return number * factor if bias is None else multiply_add(number, factor, bias)


@torch.library.custom_op(
    "graphopt::dynamic_qconv",
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, *, "
    "int[] stride, int[] padding, int[] dilation, int groups=1) -> Tensor",
)
def dynamic_qconv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """x [N, C, H, W] by weight [O, C / groups, KH, KW]: [N, O, OH, OW] float32; what is padded stands for 0.

    x_scale and x_zero_point (), weight_scale () or [O], bias float32 [O]; stride, padding and dilation give two numbers
    each. Raises UsageError for operands that do not fit.
    """
    _check_images(x, x_scale, x_zero_point, weight, weight_scale, groups)
    check_range(weight)
    centered = x.double() - x_zero_point.double()
    sums = F.conv2d(centered, weight.double(), None, list(stride), list(padding), list(dilation), groups)
    number = sums.to(torch.int64).to(torch.int32).to(torch.float32)
    factor = (x_scale * weight_scale).reshape(-1, 1, 1)
    return number * factor if bias is None else multiply_add(number, factor, bias.reshape(-1, 1, 1))


@dynamic_qconv.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1,
) -> Tensor:  # fmt: skip
    _check_images(x, x_scale, x_zero_point, weight, weight_scale, groups)
    return F.conv2d(x.float(), weight.float(), None, list(stride), list(padding), list(dilation), groups)


@dynamic_qlinear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    _check(x, x_scale, x_zero_point, weight, weight_scale)
    return x.new_empty([*x.shape[:-1], weight.shape[0]], dtype=torch.float32)


def _check_images(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor, groups: int
) -> None:
    _check_codes(x, x_zero_point, weight, weight_scale)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] * groups:
        raise UsageError(f"filters {list(weight.shape)} of {groups} groups do not fit images {list(x.shape)}")
    if x_scale.ndim or x_zero_point.ndim:
        raise UsageError("images of codes have one scale and zero point, of no axes")


def _check_codes(x: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    if x.dtype not in (torch.uint8, torch.int8) or x_zero_point.dtype != x.dtype:
        raise UsageError(f"products of codes take 8 bits and zero points of their type, not {x.dtype}")
    check_type(weight)
    if weight_scale.ndim > 1 or (weight_scale.ndim == 1 and weight_scale.shape[0] != weight.shape[0]):
        raise UsageError(f"scales of shape {list(weight_scale.shape)} do not fit {weight.shape[0]} outputs")


def _check(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    _check_codes(x, x_zero_point, weight, weight_scale)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise UsageError(f"a weight of {weight.dtype} {list(weight.shape)} does not fit rows of {x.shape[-1]} codes")
    for scales in (x_scale, x_zero_point):
        if scales.ndim and (scales.ndim != x.ndim or scales.shape[-1] != 1):
            raise UsageError(f"scales of shape {list(scales.shape)} do not fit rows of codes {list(x.shape)}")


def _refuse_gradient_of_images(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    _refuse_gradient(ctx, inputs, output)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through products of integers; train before qdq-fusion, or run under torch.no_grad()"
        )


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * 6


dynamic_qlinear.register_autograd(_no_gradient, setup_context=_refuse_gradient)
dynamic_qconv.register_autograd(_no_gradient, setup_context=_refuse_gradient_of_images)
