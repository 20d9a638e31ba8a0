"""Sequences of tensors whose length is known: each is as many values, and leaves nothing of its own in the graph."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import dtype_of
from graphopt.capture.onnx.values import Items, Known, Present, Tensor, Value, known

aten = torch.ops.aten


@operator("SequenceEmpty")
def empty(op: Operation) -> Items:
    return Items((), dtype_of(op.attributes.integer("dtype", 1), "the elements of SequenceEmpty"))


@operator("SequenceConstruct")
def construct(op: Operation, *values: Present) -> Items:
    return Items(values, values[0].dtype)


@operator("SequenceInsert")
def insert(op: Operation, items: Any, value: Present, position: Value = None) -> Items:
    held = list(_items(op, items).values)
    held.insert(len(held) if position is None else _place(op, position, len(held), end=True), value)
    return Items(tuple(held), value.dtype)


@operator("SequenceErase")
def erase(op: Operation, items: Any, position: Value = None) -> Items:
    held = list(_items(op, items).values)
    del held[len(held) - 1 if position is None else _place(op, position, len(held))]
    return Items(tuple(held), items.dtype)


@operator("SequenceAt")
def element(op: Operation, items: Any, position: Present) -> Present:
    held = _items(op, items).values
    return held[_place(op, position, len(held))]


@operator("SequenceLength")
def length(op: Operation, items: Any) -> Known:
    return known(len(_items(op, items).values))


@operator("ConcatFromSequence")
def concat(op: Operation, items: Any) -> Tensor:
    held = _items(op, items).values
    if not held:
        raise op.refuse("ConcatFromSequence of an empty sequence has no shape")
    target = aten.stack.default if op.attributes.integer("new_axis") else aten.cat.default
    return op.call(target, list(held), op.attributes.integer("axis"))


@operator("SplitToSequence")
def split(op: Operation, value: Present, sizes: Value = None) -> Items:
    """Parts of the sizes given, of one size, or of a single index, whose axis is then kept or not."""
    value = op.tensor(value)
    axis, keep = op.axis(op.attributes.integer("axis"), value.ndim), bool(op.attributes.integer("keepdims", 1))
    size = value.shape[axis]
    if not isinstance(size, int):
        raise op.refuse("SplitToSequence of a dynamic size has no known length; give that axis a number")
    given = [1] if sizes is None else op.integers(sizes, "the sizes of SplitToSequence")
    if sizes is None or sizes.ndim == 0:
        most = given[0]
        given = [min(most, size - start) for start in range(0, size, most)]
    parts = op.parts(aten.split_with_sizes.default, value, given, axis)
    if sizes is None and not keep:
        parts = tuple(op.call(aten.squeeze.dims, part, [axis]) for part in parts)
    return Items(parts, value.dtype)


def _items(op: Operation, value: Any) -> Items:
    if not isinstance(value, Items):
        raise op.refuse(f"{op.name} reads a tensor where a sequence must be; the file is damaged")
    return value


def _place(op: Operation, position: Value, count: int, *, end: bool = False) -> int:
    """Counted from 0; `end` is a place too where something is put there."""
    place = op.integers(position, f"the position of {op.name}")[0]
    if not -count <= place < count + end:
        raise op.refuse(f"position {place} does not exist among {count}")
    return place + count if place < 0 else place
