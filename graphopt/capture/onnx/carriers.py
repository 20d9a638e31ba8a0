"""Types that torch has no arithmetic for: uint16, uint32 and uint64 are carried in a wider signed type.

A value keeps its declared type. Before an operator it is cast to its carrier, after it the result is cast back, which
wraps around as arithmetic modulo 2^n does. A uint64 has a carrier of its own size: its bits stand for a signed number.
What only moves, adds or multiplies bits is exact there; what compares them sees them with the sign bit flipped, which
keeps the order; anything else is refused. So is whatever computes with a float of 8 bits or a type of fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch

from graphopt.capture.onnx.graphs import DOMAINS
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.tensors import FLOAT8
from graphopt.capture.onnx.values import Known, Present, Value, known, narrow_of
from graphopt.errors import CaptureError

aten = torch.ops.aten

CARRIERS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_SIGN = -(2**63)
_BY_TYPE = frozenset({
    "Cast", "CastLike", "BitCast", "Constant", "ConstantOfShape", "EyeLike", "Identity", "Shape", "Size",
    "SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
    "Optional", "OptionalHasElement", "OptionalGetElement",
    "QuantizeLinear", "DequantizeLinear", "com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear",
})  # fmt: skip
"""Operators that look at types themselves."""
_SAME_BITS = frozenset({
    "Add", "Sub", "Mul", "Sum", "MatMul", "Gemm", "ReduceSum", "ReduceSumSquare", "ReduceProd", "CumSum", "Equal",
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "Where", "Pad", "Reshape", "Transpose", "Concat", "Split",
    "Slice", "Gather", "GatherElements", "GatherND", "Squeeze", "Unsqueeze", "Expand", "Tile", "Flatten",
    "DepthToSpace", "SpaceToDepth", "Trilu", "OneHot",
})  # fmt: skip
_MOVES = frozenset({
    "Reshape", "Transpose", "Concat", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Expand", "Tile", "Flatten",
})  # fmt: skip
_ORDER = frozenset({
    "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Max", "Min", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin",
    "TopK", "Clip",
})  # fmt: skip


def is_unsigned(value: Value) -> bool:
    return value is not None and value.dtype in CARRIERS


def is_small(value: Value) -> bool:
    """Whether it has a type that numbers are only stored in."""
    return value is not None and (value.dtype in FLOAT8.values() or narrow_of(value) is not None)


def type_name(value: Any) -> str:
    """The type that a value has in the file."""
    kind = narrow_of(value)
    return str(value.dtype).removeprefix("torch.") if kind is None else kind.name


def carried(op: Operation, inputs: Sequence[Value]) -> list[Value]:
    """The inputs in types that the operator can be computed in. Raises CaptureError where no such type is exact."""
    for value in inputs:
        if is_small(value) and op.name not in _BY_TYPE | _MOVES:
            raise CaptureError(
                f"{op.name} of {type_name(value)} is not imported; cast or dequantize the numbers before it"
            )
    if op.name in _BY_TYPE or not any(map(is_unsigned, inputs)):
        return list(inputs)
    widest = any(value is not None and value.dtype == torch.uint64 for value in inputs)
    if widest and not _is_exact(op):
        raise CaptureError(f"{op.name} of uint64 is not imported; cast to int64 around it where no value passes 2^63")
    return [_carrier(op, value) if value is not None and is_unsigned(value) else value for value in inputs]


def declared(op: Operation, node: Any, inputs: Sequence[Value], results: Any) -> Any:
    """The results of an operator on carriers in the types that they have in the file."""
    if op.name in _MOVES and (kind := next((found for found in map(narrow_of, inputs) if found), None)) is not None:
        parts = results if isinstance(results, tuple) else (results,)
        kept = tuple(replace(op.tensor(part), narrow=kind) for part in parts)
        return kept if isinstance(results, tuple) else kept[0]
    if op.name in _BY_TYPE or not any(map(is_unsigned, inputs)):
        return results
    types = _types(op, node, inputs)
    if not isinstance(results, tuple):
        return _narrowed(op, results, types[0])
    return tuple(_narrowed(op, value, types[min(place, len(types) - 1)]) for place, value in enumerate(results))


def _is_exact(op: Operation) -> bool:
    """Whether a uint64 may be computed with as its bits."""
    if op.name == "BitShift":
        return op.attributes.text("direction", "") == "LEFT"
    if op.name in ("ScatterElements", "ScatterND"):
        return op.attributes.text("reduction", "none") in ("none", "add", "mul")
    return op.name in _SAME_BITS | _ORDER


def _carrier(op: Operation, value: Present) -> Present:
    carrier = CARRIERS[value.dtype]
    flips = value.dtype == torch.uint64 and op.name in _ORDER
    if isinstance(value, Known) and not value.symbolic:
        items = [item + _SIGN if flips else (item - _SIGN) % 2**64 + _SIGN for item in value.items()]
        return known(items, carrier, value.shape)
    wide = op.cast(value, carrier)
    return op.call(aten.bitwise_xor.Scalar, wide, _SIGN) if flips else wide


def _narrowed(op: Operation, value: Value, dtype: torch.dtype | None) -> Value:
    if value is None or dtype is None:
        return value
    if dtype == torch.uint64 and op.name in _ORDER:
        value = op.call(aten.bitwise_xor.Scalar, op.tensor(value), _SIGN)
    return op.cast(value, dtype)


def _types(op: Operation, node: Any, inputs: Sequence[Value]) -> list[torch.dtype | None]:
    """The unsigned type of each result, None for another one, by the operator's schema."""
    if node.domain not in DOMAINS:
        raise CaptureError(f"{op.name} of unsigned integers is not imported; cast to int64 around it")
    schema = onnx.defs.get_schema(node.op_type, op.opset)
    named: dict[str, torch.dtype] = {}
    for place, value in enumerate(inputs):
        if value is not None and is_unsigned(value):
            named[schema.inputs[min(place, len(schema.inputs) - 1)].type_str] = value.dtype
    return [named.get(result.type_str) for result in schema.outputs]
