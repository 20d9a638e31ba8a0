"""Sums and products of all elements up to each."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_TARGETS = {"CumSum": (aten.cumsum.default, 0), "CumProd": (aten.cumprod.default, 1)}


@operator(*_TARGETS)
def cumulative(op: Operation, value: Present, axis: Value) -> Tensor:
    target, neutral = _TARGETS[op.name]
    along = op.axis(op.integers(axis, f"the axis of {op.name}")[0], value.ndim)
    reverse, exclusive = op.attributes.integer("reverse"), op.attributes.integer("exclusive")
    result = op.tensor(value)
    if reverse:
        result = op.call(aten.flip.default, result, [along])
    if exclusive:
        first = op.call(aten.slice.Tensor, result, along, 0, 1)
        rest = op.call(aten.slice.Tensor, result, along, 0, -1)
        result = op.call(aten.cat.default, [op.call(aten.full_like.default, first, neutral), rest], along)
    result = op.call(target, result, along, dtype=value.dtype)
    return op.call(aten.flip.default, result, [along]) if reverse else result
