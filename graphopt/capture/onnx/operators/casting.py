"""Conversions between element types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graphopt.capture.onnx.narrow import NARROW, Narrow
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import DTYPES, FLOAT8, dtype_of
from graphopt.capture.onnx.values import Present, Tensor, narrow_of

aten = torch.ops.aten

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOAT8.values()}
_HALF_STEP = 16.0  # between the largest numbers of float8_e4m3fn: half of it more rounds to no number


@operator("Cast")
def cast(op: Operation, value: Present) -> Tensor:
    """Floats of 8 bits and fewer end at their largest number unless `saturate` is 0; others are cast as torch does."""
    return converted(op, value, op.attributes.integer("to"), "Cast")


@operator("CastLike")
def cast_like(op: Operation, value: Present, like: Present) -> Tensor:
    return converted(op, value, code_of(like), "CastLike")


def code_of(value: Present) -> int:
    """The ONNX type of a value."""
    kind = narrow_of(value)
    return _CODES[value.dtype] if kind is None else kind.code


def converted(op: Operation, value: Present, code: int, what: str) -> Tensor:
    """The value in the ONNX type of this code, with the settings of a Cast."""
    saturate, rounding = bool(op.attributes.integer("saturate", 1)), op.attributes.text("round_mode", "up")
    return stored(op, value, code, f"the result of {what}", saturate, rounding)


def stored(op: Operation, value: Present, code: int, what: str, saturate: bool = True, rounding: str = "up") -> Tensor:
    """The value in the ONNX type of this code; `what` has it, for the error."""
    dtype, kind = dtype_of(code, what), NARROW.get(code)
    if kind is not None:
        return replace(_four_bits(op, value) if kind.is_float else _whole(op, value, kind), narrow=kind)
    if dtype not in FLOAT8.values() or dtype == value.dtype:
        return replace(op.cast(value, dtype), narrow=None)
    number = _widened(op, value)
    if dtype == torch.float8_e8m0fnu:
        return _power_of_two(op, op.cast(number, torch.float32), saturate, rounding)
    most = _LARGEST[dtype]
    if saturate:
        number = op.call(aten.clamp.default, number, -most, most)
    elif dtype == torch.float8_e4m3fn:  # torch saturates there
        past = op.call(aten.gt.Scalar, op.call(aten.abs.default, number), most + _HALF_STEP)
        number = op.call(aten.masked_fill.Scalar, number, past, float("nan"))
    return op.cast(number, dtype)


def _widened(op: Operation, value: Present) -> Tensor:
    """As a float that arithmetic is possible on."""
    has_arithmetic = value.dtype.is_floating_point and value.dtype not in FLOAT8.values()
    return op.tensor(value) if has_arithmetic else op.cast(value, torch.float32)


def _whole(op: Operation, value: Present, kind: Narrow) -> Tensor:
    """The lowest bits of the number."""
    if narrow_of(value) == kind:
        return op.tensor(value)
    if value.dtype.is_floating_point:
        value = op.cast(value, torch.int32)
    elif value.dtype not in (torch.int8, torch.uint8):
        value = op.cast(value, torch.int64)
    bits = op.call(aten.bitwise_and.Scalar, op.cast(value, torch.uint8), 2**kind.bits - 1)
    if kind.low == 0:
        return bits
    signed = op.call(aten.bitwise_xor.Scalar, op.cast(bits, kind.carrier), -kind.low)
    return op.call(aten.sub.Tensor, signed, -kind.low)


def _four_bits(op: Operation, value: Present) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, halves to the even code; NaN becomes 0."""
    number = op.cast(_widened(op, value), torch.float32)
    size = op.call(aten.clamp.default, op.call(aten.abs.default, number), None, 6.0)
    size = op.call(aten.masked_fill.Scalar, size, op.call(aten.ne.Tensor, size, size), 0.0)
    steps = op.call(aten.where.ScalarOther, op.call(aten.lt.Scalar, size, 2.0), _full(op, size, 0.5), 1.0)
    steps = op.call(aten.masked_fill.Scalar, steps, op.call(aten.ge.Scalar, size, 4.0), 2.0)
    rounded = op.call(aten.mul.Tensor, op.call(aten.round.default, op.call(aten.div.Tensor, size, steps)), steps)
    negative = op.call(aten.lt.Scalar, number, 0.0)
    signed = op.call(aten.where.self, negative, op.call(aten.neg.default, rounded), rounded)
    return op.cast(signed, torch.float8_e4m3fn)


def _full(op: Operation, like: Tensor, number: float) -> Tensor:
    return op.call(aten.full_like.default, like, number)


def _power_of_two(op: Operation, value: Tensor, saturate: bool, rounding: str) -> Tensor:
    """The exponent of a float32 as float8_e8m0fnu, whose codes stand for 2^(code - 127) and 255 for NaN."""
    if rounding not in ("up", "down", "nearest"):
        raise op.refuse(f"round_mode {rounding!r} is none of up, down and nearest")
    bits: Any = op.call(aten.view.dtype, value, torch.int32)
    bits = op.call(aten.bitwise_and.Scalar, bits, 0x7FFFFFFF)
    past = {"up": 0x7FFFFF, "down": 0, "nearest": 0x400000}[rounding]
    code = op.call(aten.bitwise_right_shift.Tensor_Scalar, op.call(aten.add.Tensor, bits, past), 23)
    least = 0x400000  # the bits of 2^-127, which code 0 stands for
    code = op.call(aten.masked_fill.Scalar, code, op.call(aten.le.Scalar, bits, least), 0)
    if saturate:
        code = op.call(aten.clamp.default, code, None, 254)
    else:
        code = op.call(aten.masked_fill.Scalar, code, op.call(aten.lt.Scalar, bits, least), 255)
    code = op.call(aten.masked_fill.Scalar, code, op.call(aten.ne.Tensor, value, value), 255)
    return op.call(aten.view.dtype, op.cast(code, torch.uint8), torch.float8_e8m0fnu)


@operator("BitCast")
def bit_cast(op: Operation, value: Present) -> Tensor:
    """The same bits as another type of as many."""
    code = op.attributes.integer("to")
    dtype, kind = dtype_of(code, "the result of BitCast"), NARROW.get(code)
    own = narrow_of(value)
    width, wanted = ((8 * t.itemsize if k is None else k.bits) for t, k in ((value.dtype, own), (dtype, kind)))
    if width != wanted:
        raise op.refuse(f"BitCast keeps the number of bits, and its types have {width} and {wanted}")
    if kind is not None or own is not None:
        if kind is None or own is None or kind.is_float or own.is_float:
            raise op.refuse("BitCast between these types of 4 bits is not imported; cast the numbers")
        return replace(_whole(op, replace(op.tensor(value), narrow=None), kind), narrow=kind)
    if value.dtype == torch.bool:
        return op.call(aten.view.dtype, op.cast(value, torch.uint8), dtype)
    if dtype == torch.bool:
        return op.cast(op.call(aten.view.dtype, value, torch.uint8), torch.bool)
    return op.call(aten.view.dtype, value, dtype)
