"""Arithmetic, comparisons, logic and casts."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Known, Present, Tensor, known

aten = torch.ops.aten

_ARITHMETIC = {"Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor}
_COMPARISON = {"Equal": aten.eq, "Less": aten.lt, "Greater": aten.gt, "LessOrEqual": aten.le, "GreaterOrEqual": aten.ge}
_LOGIC = {"And": aten.__and__.Tensor, "Or": aten.__or__.Tensor, "Xor": aten.__xor__.Tensor}  # as Python's & is captured
_UNARY = {
    "Abs": aten.abs, "Neg": aten.neg, "Sqrt": aten.sqrt, "Exp": aten.exp, "Log": aten.log, "Erf": aten.erf,
    "Sin": aten.sin, "Cos": aten.cos, "Tan": aten.tan, "Asin": aten.asin, "Acos": aten.acos, "Atan": aten.atan,
    "Sinh": aten.sinh, "Cosh": aten.cosh, "Asinh": aten.asinh, "Acosh": aten.acosh, "Atanh": aten.atanh,
    "Floor": aten.floor, "Ceil": aten.ceil, "Round": aten.round, "Sign": aten.sign, "Reciprocal": aten.reciprocal,
    "IsNaN": aten.isnan, "BitwiseNot": aten.bitwise_not,
}  # fmt: skip
_OPPOSITE: dict[Any, Any] = {aten.eq.Scalar: aten.ne.Scalar, aten.eq.Tensor: aten.ne.Tensor}
_BITWISE = {
    "BitwiseAnd": aten.bitwise_and.Tensor, "BitwiseOr": aten.bitwise_or.Tensor, "BitwiseXor": aten.bitwise_xor.Tensor,
}  # fmt: skip


def number_for(op: Operation, value: Present, other: Present) -> Any:
    """A known number in place of a tensor operand, where broadcasting it changes no shape of the other."""
    number = op.scalar(value)
    return number if isinstance(other, Tensor) and value.ndim <= other.ndim else None


@operator("Add", "Sub", "Mul")
def arithmetic(op: Operation, left: Present, right: Present) -> Tensor:
    target = _ARITHMETIC[op.name]
    number = number_for(op, right, left)
    if number is None and op.name != "Sub" and (number := number_for(op, left, right)) is not None:
        left = right
    if left.dtype == torch.bool:
        raise op.refuse("arithmetic on truth values is not ONNX; cast them first")
    return op.call(target, op.tensor(left), right if number is None else number)


@operator("Div")
def divide(op: Operation, left: Present, right: Present) -> Tensor:
    number = number_for(op, right, left)
    if left.dtype.is_floating_point and number_for(op, left, right) == 1:
        return op.call(aten.reciprocal.default, right)
    divisor = right if number is None or isinstance(number, torch.SymInt) else number
    if left.dtype.is_floating_point:
        return op.call(aten.div.Tensor, op.tensor(left), divisor)
    return op.call(aten.div.Tensor_mode, op.tensor(left), right, rounding_mode="trunc")


@operator(*_COMPARISON)
def compare(op: Operation, left: Present, right: Present) -> Tensor:
    packet = _COMPARISON[op.name]
    number = number_for(op, right, left)
    if number is None:
        return op.call(packet.Tensor, op.tensor(left), right)
    return op.call(packet.Scalar, op.tensor(left), number)


@operator(*_LOGIC)
def logic(op: Operation, left: Present, right: Present) -> Tensor:
    return op.call(_LOGIC[op.name], left, right)


@operator("Not")
def negate(op: Operation, value: Present) -> Tensor:
    """What is not equal is written as such."""
    value = op.tensor(value)
    if value.node.target not in _OPPOSITE:
        return op.call(aten.bitwise_not.default, value)
    compared = (Tensor(item, item.meta["val"]) if isinstance(item, Node) else item for item in value.node.args)
    return op.call(_OPPOSITE[value.node.target], *compared)


@operator(*_BITWISE)
def bitwise(op: Operation, left: Present, right: Present) -> Tensor:
    return op.call(_BITWISE[op.name], left, right)


@operator("BitShift")
def bit_shift(op: Operation, value: Present, places: Present) -> Tensor:
    targets = {"LEFT": aten.bitwise_left_shift.Tensor, "RIGHT": aten.bitwise_right_shift.Tensor}
    direction = op.attributes.text("direction", "")
    if direction not in targets:
        raise op.refuse(f"the direction {direction!r} is neither LEFT nor RIGHT")
    return op.call(targets[direction], value, places)


@operator(*_UNARY)
def unary(op: Operation, value: Present) -> Tensor:
    return op.call(_UNARY[op.name].default, value)


@operator("IsInf")
def is_infinite(op: Operation, value: Present) -> Tensor:
    positive, negative = op.attributes.integer("detect_positive", 1), op.attributes.integer("detect_negative", 1)
    if positive and negative:
        return op.call(aten.isinf.default, value)
    if not positive and not negative:
        return op.call(aten.zeros_like.default, value, dtype=torch.bool)
    return op.call(aten.eq.Scalar, value, float("inf" if positive else "-inf"))


@operator("Pow")
def power(op: Operation, base: Present, exponent: Present) -> Tensor:
    number = number_for(op, exponent, base)
    if number is None:
        result = op.call(aten.pow.Tensor_Tensor, op.tensor(base), exponent)
    else:
        whole = isinstance(number, float) and number.is_integer()
        result = op.call(aten.pow.Tensor_Scalar, op.tensor(base), int(number) if whole else number)
    return op.cast(result, base.dtype)


@operator("Mod")
def modulo(op: Operation, left: Present, right: Present) -> Tensor:
    target = aten.fmod.Tensor if op.attributes.integer("fmod") else aten.remainder.Tensor
    return op.call(target, op.tensor(left), right)


@operator("Min", "Max")
def extremum(op: Operation, *values: Present) -> Tensor:
    target = aten.minimum.default if op.name == "Min" else aten.maximum.default
    return reduce(lambda left, right: op.call(target, left, right), map(op.tensor, values))


@operator("Sum", "Mean")
def total(op: Operation, *values: Present) -> Tensor:
    result = reduce(lambda left, right: op.call(aten.add.Tensor, left, right), map(op.tensor, values))
    return op.call(aten.div.Tensor, result, len(values)) if op.name == "Mean" else result


@operator("Clip")
def clip(op: Operation, value: Present, low: Present | None = None, high: Present | None = None) -> Tensor:
    """Before opset 11 the bounds are attributes."""
    if op.opset < 11:
        bounds = (op.attributes.number(name, 0.0) if op.attributes.has(name) else None for name in ("min", "max"))
        low, high = (None if bound is None else known(bound, value.dtype) for bound in bounds)
    least, most = op.scalar(low), op.scalar(high)
    if low is None and high is None:
        return op.tensor(value)
    if (low is None) != (least is None) or (high is None) != (most is None):
        return op.call(aten.clamp.Tensor, value, low, high)
    if least is not None and most is not None and least > most:
        least = most
    if (least, most) == (0, 6) and value.dtype.is_floating_point:
        return op.call(aten.hardtanh.default, value, 0.0, 6.0)
    return op.call(aten.clamp.default, value, least, most)


@operator("Where")
def where(op: Operation, condition: Present, left: Present, right: Present) -> Tensor:
    number = op.scalar(left)
    if number is not None and isinstance(right, Tensor) and left.ndim <= right.ndim and _fits(condition, right):
        return op.call(aten.masked_fill.Scalar, right, condition, number)
    return op.call(aten.where.self, condition, left, right)


def _fits(mask: Present, value: Tensor) -> bool:
    """Whether the mask broadcasts to the value's shape, for all sizes."""
    if isinstance(mask, Known) or mask.ndim > value.ndim:
        return False
    pairs = zip(mask.shape[::-1], value.shape[::-1], strict=False)
    return all(statically_known_true(a == b) or statically_known_true(a == 1) for a, b in pairs)


@operator("Identity")
def identity(op: Operation, value: Present) -> Present:
    return value


@operator("Dropout")
def dropout(op: Operation, value: Present, ratio: Present | None = None, training: Present | None = None) -> Any:
    """The value, and where asked for a mask that keeps everything; dropping no share of it is the same in training."""
    op.attributes.ignore("ratio", "seed")
    refusal = "it drops values at random; export the model in eval mode"
    trains = training is not None and op.number(training, "the mode of Dropout", refusal) is not False
    if trains and (ratio is None or op.number(ratio, "the ratio of Dropout", refusal) != 0):
        raise op.refuse(refusal)
    if op.outputs == 1:
        return value
    dtype = torch.bool if op.opset >= 10 else value.dtype
    return value, op.call(aten.ones_like.default, value, dtype=dtype)


@operator("Shrink")
def shrink(op: Operation, value: Present) -> Tensor:
    """0 between -lambd and lambd; `bias` nearer to it elsewhere."""
    bound, bias = op.attributes.number("lambd", 0.5), op.attributes.number("bias", 0.0)
    value = op.tensor(value)
    nearer = op.call(aten.sub.Tensor, value, bias), op.call(aten.add.Tensor, value, bias)
    zeros = op.call(aten.zeros_like.default, value)
    low = op.call(aten.where.self, op.call(aten.lt.Scalar, value, -bound), nearer[1], zeros)
    return op.cast(op.call(aten.where.self, op.call(aten.gt.Scalar, value, bound), nearer[0], low), value.dtype)
