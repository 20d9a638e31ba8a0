"""The largest and smallest elements, and where they are."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value
from graphopt.operators.quantization import along

aten = torch.ops.aten


@operator("TopK")
def top_k(op: Operation, value: Present, count: Value = None) -> Any:
    """Of equal elements the one with the lower index comes first. Before opset 10 the count is an attribute."""
    value = op.tensor(value)
    if not value.ndim:
        raise op.refuse("TopK of a single number does not exist")
    axis = op.axis(op.attributes.integer("axis", -1), value.ndim)
    largest = bool(op.attributes.integer("largest", 1))
    op.attributes.ignore("sorted")  # in any order, so in this one
    most = op.attributes.integer("k") if op.opset < 10 else op.sizes(count, "the count of TopK")[0]
    if isinstance(most, int) and isinstance(value.shape[axis], int) and not 0 <= most <= value.shape[axis]:
        raise op.refuse(f"TopK takes {most} of {value.shape[axis]} elements")
    ordered = op.parts(aten.sort.stable, value, stable=True, dim=axis, descending=largest)
    return tuple(op.call(aten.slice.Tensor, part, axis, 0, most) for part in ordered)


@operator("ArgMax", "ArgMin")
def arg_extremum(op: Operation, value: Present) -> Tensor:
    """The first of equal elements, or the last."""
    value = op.tensor(value)
    target = aten.argmax.default if op.name == "ArgMax" else aten.argmin.default
    axis, keep = op.axis(op.attributes.integer("axis"), value.ndim), bool(op.attributes.integer("keepdims", 1))
    if not op.attributes.integer("select_last_index"):
        return op.call(target, value, axis, keep)
    place = op.call(target, op.call(aten.flip.default, value, [axis]), axis, keep)
    return op.call(aten.add.Tensor, op.call(aten.neg.default, place), value.shape[axis] - 1)


@operator("Hardmax")
def hardmax(op: Operation, value: Present) -> Tensor:
    """1 at the first of the largest elements, 0 elsewhere. Before opset 13 the axes from `axis` on are one."""
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis", -1 if op.opset >= 13 else 1), value.ndim)
    flat = value
    if op.opset < 13 and axis != value.ndim - 1:
        flat, axis = op.reshape(value, [*value.shape[:axis], -1]), axis
    place = op.call(aten.argmax.default, flat, axis, True)
    places = op.reshape(op.call(aten.arange.default, flat.shape[axis]), along(axis, flat.ndim))
    return op.reshape(op.cast(op.call(aten.eq.Tensor, places, place), value.dtype), list(value.shape))


@operator("OneHot")
def one_hot(op: Operation, index: Present, depth: Present, values: Present) -> Tensor:
    """`on` at the index, which counts from the end where it is negative, and nowhere where it is out of range."""
    axis = op.attributes.integer("axis", -1)
    size = op.sizes(depth, "the depth of OneHot")[0]
    size = int(size) if isinstance(size, float) else size
    pair = op.tensor(values)
    off, on = op.call(aten.select.int, pair, 0, 0), op.call(aten.select.int, pair, 0, 1)
    place = op.axis(axis, index.ndim + 1)
    whole = op.cast(index, torch.int64)
    if op.opset >= 11:
        back = op.call(aten.lt.Scalar, whole, 0)
        whole = op.call(aten.where.self, back, op.call(aten.add.Tensor, whole, size), whole)
    whole = op.call(aten.unsqueeze.default, whole, place)
    rows = op.reshape(op.call(aten.arange.default, size), along(place, index.ndim + 1))
    return op.call(aten.where.self, op.call(aten.eq.Tensor, whole, rows), on, off)
