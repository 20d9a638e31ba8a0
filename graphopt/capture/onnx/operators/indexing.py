"""Reading and writing by index."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Known, Present, Tensor, Value
from graphopt.operators import integer_elements  # noqa: F401

aten = torch.ops.aten
_IN_TABLES = (torch.float32, torch.uint8, torch.int8)


@operator("Gather")
def gather(op: Operation, value: Present, index: Present) -> Tensor:
    """Rows of a held table of numbers or codes are an embedding; elsewhere a negative index counts from the end.

    ONNX allows negative ids of an embedding too, which no exporter writes and PyTorch refuses at run time.
    """
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    if index.ndim == 0 and (number := op.scalar(index)) is not None:
        return op.call(aten.select.int, value, axis, number)
    if (found := _table_of_codes(op, value, index)) is not None:
        return found
    held = value.node.op == "get_attr" or value.node.target is torch.ops.graphopt.dequantize.default
    is_table = axis == 0 and value.ndim == 2 and value.dtype.is_floating_point and held
    if is_table and isinstance(index, Tensor) and index.ndim and index.dtype in (torch.int64, torch.int32):
        return op.call(aten.embedding.default, value, index)
    return op.call(aten.index.Tensor, value, [None] * axis + [op.tensor(index)])


def _table_of_codes(op: Operation, table: Tensor, index: Present) -> Tensor | None:
    """A held table of numbers or codes read at 8-bit codes; at signed ones the upper half is that of negative ones."""
    source = index.node.args[0] if isinstance(index, Tensor) and index.node.target is aten._to_copy.default else None
    held = op.emitter.held(table.node)
    if not isinstance(source, Node) or held is None or tuple(held.shape) != (256,) or held.dtype not in _IN_TABLES:
        return None
    codes = Tensor(source, source.meta["val"])
    if codes.dtype not in (torch.uint8, torch.int8):
        return None
    if codes.dtype == torch.int8:
        table = op.emitter.attribute(op.emitter.weights.constant(held.detach().roll(128)))
    return op.call(torch.ops.graphopt.table256.default, codes, table)


@operator("GatherND")
def gather_nd(op: Operation, value: Present, index: Present) -> Tensor:
    batch = op.attributes.integer("batch_dims")
    index = op.tensor(index)
    depth = index.shape[-1]
    if not isinstance(depth, int):
        raise op.refuse("the last axis of the indices of GatherND is dynamic; give it a number")
    places: list[Any] = []
    for axis in range(batch):
        shape = [-1 if other == axis else 1 for other in range(index.ndim - 1)]
        places.append(op.reshape(op.call(aten.arange.default, index.shape[axis]), shape))
    places += [op.call(aten.select.int, index, -1, item) for item in range(depth)]
    return op.call(aten.index.Tensor, op.tensor(value), places)


@operator("GatherElements")
def gather_elements(op: Operation, value: Present, index: Present) -> Tensor:
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    return op.call(aten.gather.default, value, axis, _from_start(op, index, value.shape[axis]))


@operator("ScatterElements")
def scatter_elements(op: Operation, value: Present, index: Present, updates: Present) -> Tensor:
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    index = _from_start(op, index, value.shape[axis])
    kinds = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    reduction = op.attributes.text("reduction", "none")
    if reduction == "none":
        return op.call(aten.scatter.src, value, axis, index, updates)
    return op.call(aten.scatter_reduce.two, value, axis, index, updates, kinds[reduction])


@operator("ScatterND")
def scatter_nd(op: Operation, value: Present, index: Present, updates: Present) -> Tensor:
    if op.attributes.text("reduction", "none") != "none":
        raise op.refuse("ScatterND that combines values is not imported")
    index = op.tensor(index)
    depth = index.shape[-1]
    if not isinstance(depth, int):
        raise op.refuse("the last axis of the indices of ScatterND is dynamic; give it a number")
    places = [op.call(aten.select.int, index, -1, item) for item in range(depth)]
    return op.call(aten.index_put.default, op.tensor(value), places, updates)


def _from_start(op: Operation, index: Present, size: Any) -> Tensor:
    """Indices of which negative ones count from the end, as PyTorch's gather and scatter want them."""
    if isinstance(index, Known) and all(isinstance(item, int) and item >= 0 for item in index.items()):
        return op.cast(index, torch.int64)
    index = op.cast(index, torch.int64)
    shifted = op.call(aten.add.Tensor, index, size)
    return op.call(aten.where.self, op.call(aten.lt.Scalar, index, 0), shifted, index)


@operator("TopK")
def top_k(op: Operation, value: Present, count: Present) -> Any:
    axis, largest = op.attributes.integer("axis", -1), bool(op.attributes.integer("largest", 1))
    ordered = bool(op.attributes.integer("sorted", 1))
    return op.parts(aten.topk.default, value, op.integers(count, "the count of TopK")[0], axis, largest, ordered)


@operator("ArgMax", "ArgMin")
def arg_extremum(op: Operation, value: Present) -> Tensor:
    if op.attributes.integer("select_last_index"):
        raise op.refuse("select_last_index is not imported")
    target = aten.argmax.default if op.name == "ArgMax" else aten.argmin.default
    return op.call(target, value, op.attributes.integer("axis"), bool(op.attributes.integer("keepdims", 1)))


@operator("OneHot")
def one_hot(op: Operation, index: Present, depth: Present, values: Present) -> Tensor:
    axis = op.attributes.integer("axis", -1)
    size = op.integers(depth, "the depth of OneHot")[0]
    off, on = op.tensor(values), op.tensor(values)
    off, on = op.call(aten.select.int, off, 0, 0), op.call(aten.select.int, on, 0, 1)
    place = op.axis(axis, index.ndim + 1)
    whole = op.cast(index, torch.int64)
    whole = op.call(aten.unsqueeze.default, op.call(aten.remainder.Scalar, whole, size), place)
    rows = op.reshape(op.call(aten.arange.default, size), [-1 if a == place else 1 for a in range(index.ndim + 1)])
    return op.call(aten.where.self, op.call(aten.eq.Tensor, whole, rows), on, off)


@operator("CumSum")
def cumulative_sum(op: Operation, value: Present, axis: Value) -> Tensor:
    along = op.axis(op.integers(axis, "the axis of CumSum")[0], value.ndim)
    reverse, exclusive = op.attributes.integer("reverse"), op.attributes.integer("exclusive")
    result = op.tensor(value)
    if reverse:
        result = op.call(aten.flip.default, result, [along])
    before = result
    result = op.call(aten.cumsum.default, result, along, dtype=value.dtype)
    if exclusive:
        result = op.call(aten.sub.Tensor, result, before)
    return op.call(aten.flip.default, result, [along]) if reverse else result
