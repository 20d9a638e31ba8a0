"""Quantized operators of the standard domain.

Those on codes become dequantize -> operator on numbers -> quantize, so that files in QOperator and in QDQ format have
one form. Where ONNX Runtime adds integers and rounds once, this adds float32 products: a code differs by one where the
value before rounding is within float32's error of a half.

Integer products (MatMulInteger, ConvInteger) are float products of code - zero_point, and exact: see `_exact_type`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from onnx import TensorProto

from graphopt.capture.onnx.narrow import NARROW, Narrow
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.casting import code_of, stored
from graphopt.capture.onnx.operators.convolution import conv
from graphopt.capture.onnx.operators.linear import matmul
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import FLOAT8, dtype_of
from graphopt.capture.onnx.values import Known, Present, Tensor, Value, known
from graphopt.operators.quantization import CODES, along
from graphopt.program import get_attribute

aten = torch.ops.aten
_QUANTIZE = torch.ops.graphopt.quantize.default
_DEQUANTIZE = torch.ops.graphopt.dequantize.default
_HALVES = (torch.float16, torch.bfloat16)
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}  # up to which every integer is a value of the type


@operator("QuantizeLinear", "com.microsoft.QuantizeLinear")
def quantize_linear(op: Operation, value: Present, scale: Present, zero: Present | None = None) -> Tensor:
    saturate = bool(op.attributes.integer("saturate", 1))
    axis, block = op.attributes.integer("axis", 1), op.attributes.integer("block_size")
    precision = op.attributes.integer("precision")
    asked = op.attributes.integer("output_dtype") or TensorProto.UINT8
    code = asked if zero is None else code_of(zero)
    if precision not in (0, TensorProto.FLOAT, TensorProto.FLOAT16):
        raise op.refuse("QuantizeLinear with a precision other than float and float16 is not imported")
    if precision == TensorProto.FLOAT16:
        scale = op.cast(scale, torch.float16)
    if precision == TensorProto.FLOAT16 or (not precision and op.opset >= 23 and scale.dtype in _HALVES):
        value = op.cast(value, scale.dtype)
    dtype = dtype_of(code, "the result of QuantizeLinear")
    if dtype in FLOAT8.values():
        steps = _spread(op, op.tensor(value), scale, axis, block)
        return stored(op, op.call(aten.div.Tensor, op.tensor(value), steps), code, "QuantizeLinear", saturate)
    return quantized(op, value, scale, zero, axis, block, dtype, NARROW.get(code))


@operator("DequantizeLinear", "com.microsoft.DequantizeLinear")
def dequantize_linear(op: Operation, value: Present, scale: Present, zero: Present | None = None) -> Tensor:
    axis, block = op.attributes.integer("axis", 1), op.attributes.integer("block_size")
    asked = op.attributes.integer("output_dtype")
    dtype = dtype_of(asked, "the result of DequantizeLinear") if asked else None
    return dequantized(op, value, scale, zero, axis, block, dtype)


def quantized(
    op: Operation, value: Present, scale: Present, zero: Value, axis: int = 1, block: int = 0,
    dtype: torch.dtype = torch.uint8, kind: Narrow | None = None,
) -> Tensor:  # fmt: skip
    """The codes of a tensor, of the type of the zero point where there is one; `kind`: a type of few bits."""
    value, dtype = op.tensor(value), dtype if zero is None else zero.dtype
    if not value.dtype.is_floating_point:
        value = op.cast(value, torch.float32)
    if dtype == torch.uint16:
        middle = known(2**15, torch.int32) if zero is None else op.cast(zero, torch.int32)
        zero = op.cast(op.call(aten.sub.Tensor, op.tensor(middle), 2**15), torch.int16)
        if zero.ndim < scale.ndim:
            zero = op.call(aten.expand.default, zero, list(scale.shape))
        codes = quantized(op, value, scale, zero, axis, block)
        return op.cast(op.call(aten.add.Tensor, op.cast(codes, torch.int32), 2**15), dtype)
    if dtype not in (torch.uint8, torch.int8, torch.int16):
        raise op.refuse(f"quantization to {str(dtype).removeprefix('torch.')} is not imported; use 8 bits")
    low, high = CODES[dtype] if kind is None else (kind.low, kind.high)
    scale, zero, where = parameters(op, value, scale, zero, axis, block)
    codes = op.call(_QUANTIZE, value, scale, zero, **where, qmin=low, qmax=high, dtype=dtype)
    return replace(codes, narrow=kind)


def dequantized(
    op: Operation, value: Present, scale: Present, zero: Value, axis: int = 1, block: int = 0,
    dtype: torch.dtype | None = None, codes: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The numbers that codes stand for, by default in the type of the scale; `codes`: the lowest and highest one."""
    value, dtype = op.tensor(value), scale.dtype if dtype is None else dtype
    if value.dtype in FLOAT8.values():
        return _widened(op, value, scale, axis, block, dtype)
    kind = value.narrow
    if value.dtype == torch.uint16:
        value, zero = op.cast(value, torch.int32), None if zero is None else op.cast(zero, torch.int32)
        codes = 0, 2**16 - 1
    if value.dtype not in CODES:
        raise op.refuse(f"codes of type {str(value.dtype).removeprefix('torch.')} are not imported; use 8 bits")
    low, high = codes or (CODES[value.dtype] if kind is None else (kind.low, kind.high))
    scale, zero, where = parameters(op, value, scale, zero, axis, block)
    return op.call(_DEQUANTIZE, value, scale, zero, **where, qmin=low, qmax=high, dtype=dtype)


def _widened(op: Operation, value: Tensor, scale: Present, axis: int, block: int, dtype: torch.dtype) -> Tensor:
    """Weights of 8-bit floats times their scale; the standard allows no zero point but 0."""
    steps = held_tensor(op, scale)
    if steps is None or block or op.emitter.held(value.node) is None:
        numbers = op.cast(value, torch.float32)
        spread = op.cast(_spread(op, numbers, scale, axis, block), torch.float32)
        return op.cast(op.call(aten.mul.Tensor, numbers, spread), dtype)
    if steps.numel() > 1:
        steps = steps.reshape(along(op.axis(axis, value.ndim), value.ndim))
    return op.weight(value, lambda held: (held.float() * steps.float()).to(dtype).reshape(held.shape))


def _spread(op: Operation, value: Tensor, scale: Present, axis: int, block: int) -> Tensor:
    """Scales in the shape of what they divide, or one that broadcasts to it."""
    if scale.dtype in FLOAT8.values():
        scale = op.cast(scale, torch.float32)
    steps, _, where = parameters(op, value, scale, None, axis, block)
    if not where:
        return op.tensor(steps)
    if not block:
        return op.reshape(steps, along(where["axis"], value.ndim))
    repeated = op.call(aten.repeat_interleave.self_int, op.tensor(steps), block, where["axis"])
    return op.call(aten.slice.Tensor, repeated, where["axis"], 0, value.shape[where["axis"]])


def parameters(
    op: Operation, value: Tensor, scale: Present, zero: Value, axis: int, block: int
) -> tuple[Present, Value, dict[str, Any]]:
    """Scale and zero point as graphopt has them, and `axis` and `block`; a vector of one element is for the whole."""
    if scale.ndim == 0 or (scale.ndim == 1 and scale.shape[0] == 1 and (value.ndim == 0 or not block)):
        return _alone(op, scale), None if zero is None else _alone(op, zero), {}
    if not block and scale.ndim != 1:
        raise op.refuse(f"a scale with {scale.ndim} axes needs a block_size")
    axis = 0 if value.ndim == 1 else op.axis(axis, value.ndim)  # the default, 1, is written for vectors too
    return scale, zero, {"axis": axis, "block": block} if block else {"axis": axis}


def _alone(op: Operation, value: Present) -> Present:
    if value.ndim == 0:
        return value
    if isinstance(value, Known):
        return known(value.items(), value.dtype, ())
    held = held_tensor(op, value)
    if held is None:
        return op.reshape(value, [])
    return op.emitter.attribute(op.emitter.weights.constant(held.reshape(())))


def held_tensor(op: Operation, value: Value) -> torch.Tensor | None:
    """The elements of a value that the file holds."""
    if isinstance(value, Known):
        return None if value.symbolic else value.tensor()
    if value is None or value.node.op != "get_attr":
        return None
    held: torch.Tensor = get_attribute(op.emitter.weights.root, str(value.node.target)).detach()
    return held


def product_of(op: Operation, left: Present, right: Present) -> Present:
    """Of two scales: the scale of what is added to a product, computed now where the file holds both."""
    a, b = held_tensor(op, left), held_tensor(op, right)
    if a is None or b is None:
        return op.call(aten.mul.Tensor, op.tensor(left), right)
    return op.emitter.attribute(op.emitter.weights.constant(a * b))


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(op: Operation, value: Present) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point such that 0 and all elements lie between code 0 and code 255."""
    return dynamically_quantized(op, op.tensor(value))


def dynamically_quantized(op: Operation, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = op.parts(torch.ops.graphopt.dynamic_quantize.default, value)
    return codes, scale, zero


@operator("QLinearMatMul")
def quantized_matmul(
    op: Operation, a: Present, a_scale: Present, a_zero: Present, b: Present, b_scale: Present, b_zero: Present,
    scale: Present, zero: Present,
) -> Tensor:  # fmt: skip
    """Scales of the left side and the result may be given for each row, of the right side for each column."""
    left = dequantized(op, a, a_scale, a_zero, axis=-2)
    right = dequantized(op, b, b_scale, b_zero, axis=-1)
    return quantized(op, matmul(op, left, right), scale, zero, axis=-2)


@operator("QLinearConv")
def quantized_convolution(
    op: Operation, x: Present, x_scale: Present, x_zero: Present, w: Present, w_scale: Present, w_zero: Present,
    scale: Present, zero: Present, bias: Present | None = None,
) -> Tensor:  # fmt: skip
    """The bias counts in steps of x_scale * w_scale."""
    value, weight = dequantized(op, x, x_scale, x_zero), dequantized(op, w, w_scale, w_zero, axis=0)
    added = None if bias is None else dequantized(op, bias, product_of(op, x_scale, w_scale), None, axis=0)
    return quantized(op, conv(op, value, weight, added), scale, zero)


@operator("MatMulInteger")
def integer_matmul(
    op: Operation, left: Present, right: Present, left_zero: Present | None = None, right_zero: Present | None = None
) -> Tensor:
    """Zero points of the left side may be given for each row, of the right side for each column."""
    depth = left.shape[-1] if left.ndim else 1
    sums = _largest_sum(op, right, right_zero, -1, [0])
    dtype = _exact_type(depth, _largest(op, left, left_zero), _largest(op, right, right_zero), sums)
    sides = _centered(op, left, left_zero, -2, dtype), _centered(op, right, right_zero, -1, dtype)
    return _whole(op, matmul(op, *sides), depth)


@operator("ConvInteger")
def integer_convolution(
    op: Operation, value: Present, weight: Present, zero: Present | None = None, weight_zero: Present | None = None
) -> Tensor:
    """Padding stands for 0, as if it held the zero point."""
    depth = math.prod(weight.shape[1:])
    sums = _largest_sum(op, weight, weight_zero, 0, list(range(1, weight.ndim)))
    dtype = _exact_type(depth, _largest(op, value, zero), _largest(op, weight, weight_zero), sums)
    sides = _centered(op, value, zero, 1, dtype), _centered(op, weight, weight_zero, 0, dtype)
    return _whole(op, conv(op, *sides), depth)


def _centered(op: Operation, value: Present, zero: Value, axis: int, dtype: torch.dtype) -> Tensor:
    """code - zero_point: what a scale of 1 makes of the codes."""
    scale = known(1.0, dtype)
    if zero is None or zero.ndim == 0 or tuple(zero.shape) == (1,):
        return dequantized(op, value, scale, zero, axis, dtype=dtype)
    if zero.ndim != 1 or not isinstance(zero.shape[0], int):
        raise op.refuse("zero points with more than one axis are not imported; give one for each row or column")
    ones = op.emitter.attribute(op.emitter.weights.constant(torch.ones(zero.shape[0], dtype=dtype)))
    return dequantized(op, value, ones, zero, axis, dtype=dtype)


def _largest(op: Operation, value: Present, zero: Value) -> int:
    """The largest absolute value of code - zero_point."""
    low, high = CODES[value.dtype]
    held = torch.zeros(()) if zero is None else held_tensor(op, zero)
    if held is None or held.numel() == 0:
        return high - low
    return max(high - int(held.min()), int(held.max()) - low)


def _largest_sum(op: Operation, weight: Present, zero: Value, axis: int, summed: list[int]) -> int | None:
    """The largest sum of absolute values that one element of the result is made from; None where it is not known."""
    held, at = held_tensor(op, weight), torch.zeros(()) if zero is None else held_tensor(op, zero)
    if held is None or at is None or held.ndim < 2 or (axis == -1 and held.ndim > 2) or held.numel() == 0:
        return None
    if at.ndim:
        at = at.reshape([-1 if number == axis % held.ndim else 1 for number in range(held.ndim)])
    return int((held.to(torch.int64) - at.to(torch.int64)).abs().sum(summed).max())


def _exact_type(depth: Any, left: int, right: int, weight_sum: int | None) -> torch.dtype:
    """A type in which the product is exact, in whatever order and with whatever fusing it is added up.

    Factors are integers. Where the sum of the absolute values of all products is at most 2^24, so is every partial sum,
    and each is a float32. The weight's own values give the sum for most layers, otherwise the types and `depth`, the
    number of products, do. float64 has room for all that fit a machine: 2^53 of 255 * 255 in a sum of 2^37 products.
    """
    bounds = [] if weight_sum is None else [weight_sum * left]
    bounds += [depth * left * right] if isinstance(depth, int) else []
    return torch.float32 if any(bound <= _EXACT[torch.float32] for bound in bounds) else torch.float64


def _whole(op: Operation, product: Tensor, depth: Any) -> Tensor:
    """As int32; sums that it cannot hold wrap around, which int64 on the way defines."""
    fits = isinstance(depth, int) and depth * 255 * 255 < 2**31
    return op.cast(product if fits else op.cast(product, torch.int64), torch.int32)
