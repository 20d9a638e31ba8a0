"""Operators on uint64 whose results depend on the sign bit: computed on the bits, as int64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_SIGN, _REST = -(2**63), 2**63 - 1


def by_bits(op: Operation, inputs: Sequence[Value]) -> Tensor | None:
    """The result of Div, Mod, a BitShift to the right, or Pow with an exponent of uint64; None for anything else."""
    if op.name not in ("Div", "Mod", "BitShift", "Pow") or len(inputs) != 2:
        return None
    left, right = inputs
    if left is None or right is None or right.dtype != torch.uint64:
        return None
    if op.name == "Pow":
        if not left.dtype.is_floating_point:
            return None
        exponent = op.cast(right, torch.float64)
        return op.cast(op.call(aten.pow.Tensor_Tensor, op.cast(left, torch.float64), exponent), left.dtype)
    if op.name == "BitShift":
        if op.attributes.text("direction", "") != "RIGHT":
            return None
        result = _shifted(op, _bits(op, left), _bits(op, right))
    else:
        op.attributes.ignore("fmod")  # of two numbers that are not negative it is the same
        quotient = _divided(op, _bits(op, left), _bits(op, right))
        result = quotient if op.name == "Div" else _rest(op, _bits(op, left), quotient, _bits(op, right))
    return op.cast(result, torch.uint64)


def _bits(op: Operation, value: Present) -> Tensor:
    return op.cast(value, torch.int64)


def _rest(op: Operation, left: Tensor, quotient: Tensor, right: Tensor) -> Tensor:
    return op.call(aten.sub.Tensor, left, op.call(aten.mul.Tensor, quotient, right))


def _reaches(op: Operation, left: Tensor, right: Tensor) -> Tensor:
    """left >= right, both without sign."""
    ordered = [op.call(aten.bitwise_xor.Scalar, value, _SIGN) for value in (left, right)]
    return op.call(aten.ge.Tensor, *ordered)


def _halved(op: Operation, value: Tensor) -> Tensor:
    return op.call(aten.bitwise_and.Scalar, op.call(aten.bitwise_right_shift.Tensor_Scalar, value, 1), _REST)


def _divided(op: Operation, left: Tensor, right: Tensor) -> Tensor:
    """Half of the dividend is a number with sign: twice its quotient is the quotient, or one less."""
    is_large = op.call(aten.lt.Scalar, right, 0)
    divisor = op.call(aten.masked_fill.Scalar, right, is_large, 1)
    half = op.call(aten.div.Tensor_mode, _halved(op, left), divisor, rounding_mode="trunc")
    quotient = op.call(aten.mul.Tensor, half, 2)
    more = op.cast(_reaches(op, _rest(op, left, quotient, divisor), divisor), torch.int64)
    quotient = op.call(aten.add.Tensor, quotient, more)
    return op.call(aten.where.self, is_large, op.cast(_reaches(op, left, right), torch.int64), quotient)


def _shifted(op: Operation, value: Tensor, places: Tensor) -> Tensor:
    """By 64 and more places nothing is left."""
    rest = op.call(aten.clamp.default, op.call(aten.sub.Tensor, places, 1), 0, 62)
    moved = op.call(aten.bitwise_right_shift.Tensor, _halved(op, value), rest)
    some = op.call(aten.where.self, op.call(aten.eq.Scalar, places, 0), value, moved)
    past = op.call(aten.ne.Tensor, op.call(aten.clamp.default, places, 0, 63), places)
    return op.call(aten.masked_fill.Scalar, some, past, 0)
