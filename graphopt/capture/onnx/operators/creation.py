"""Constants, sizes of values, ranges and filled tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from graphopt.capture.onnx.narrow import Narrow
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import FLOAT8, dtype_of
from graphopt.capture.onnx.values import KNOWN_ELEMENTS, Known, Present, Tensor, known, known_tensor

aten = torch.ops.aten


@operator("Shape")
def shape(op: Operation, value: Present) -> Known:
    sizes = list(value.shape)
    start, end = op.attributes.integer("start"), op.attributes.integer("end", len(sizes))
    return known(sizes[start:end])


@operator("Size")
def size(op: Operation, value: Present) -> Known:
    return known(math.prod(value.shape))


@operator("Constant")
def constant(op: Operation) -> Present:
    attributes = op.attributes
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        if attributes.has(name):
            single = attributes.number(name, 0.0) if dtype.is_floating_point else attributes.integer(name)
            return known(single, dtype)
    integers, numbers, value = attributes.integers("value_ints"), attributes.numbers("value_floats"), None
    kind = None
    if integers is not None:
        value = torch.tensor(integers, dtype=torch.int64)
    elif numbers is not None:
        value = torch.tensor(numbers, dtype=torch.float32)
    else:
        value, kind = attributes.tensor("value"), attributes.narrow("value")
    if value is None:
        raise op.refuse("the constant has no value that graphopt imports; strings and sparse tensors are not")
    return _held(op, value, kind)


def _held(op: Operation, value: torch.Tensor, kind: Narrow | None) -> Present:
    """Few numbers are known, but for types that numbers are only stored in."""
    if value.numel() <= KNOWN_ELEMENTS and kind is None and value.dtype not in FLOAT8.values():
        return known_tensor(value)
    tensor = op.emitter.attribute(op.emitter.weights.add("constant", value, trainable=False))
    return replace(tensor, narrow=kind)


@operator("ConstantOfShape")
def constant_of_shape(op: Operation, sizes: Present) -> Present:
    value, kind = op.attributes.tensor("value"), op.attributes.narrow("value")
    value = torch.zeros(1) if value is None else value
    lengths = op.sizes(sizes, "the shape of the constant")
    concrete = [item for item in lengths if isinstance(item, int)]
    if len(concrete) == len(lengths) and math.prod(concrete) <= KNOWN_ELEMENTS:
        return _held(op, torch.full(concrete, value.item(), dtype=value.dtype), kind)
    return replace(op.call(aten.full.default, lengths, value.item(), dtype=value.dtype), narrow=kind)


@operator("Range")
def range_(op: Operation, start: Present, limit: Present, step: Present) -> Present:
    first, end, by = (op.sizes(item, "the range")[0] for item in (start, limit, step))
    if all(isinstance(item, int) for item in (first, end, by)) and len(range(first, end, by)) <= KNOWN_ELEMENTS:
        return known(list(range(first, end, by)), start.dtype)
    bounds = (end,) if isinstance(first, int) and (first, by) == (0, 1) else (first, end, by)
    target = aten.arange.default if len(bounds) == 1 else aten.arange.start_step
    extra = {} if start.dtype == torch.int64 else {"dtype": start.dtype}
    return op.call(target, *bounds, **extra, device=torch.device("cpu"), pin_memory=False)


@operator("EyeLike")
def eye_like(op: Operation, value: Present) -> Tensor:
    diagonal = op.attributes.integer("k")
    dtype = dtype_of(op.attributes.integer("dtype", 0), "EyeLike") if op.attributes.has("dtype") else value.dtype
    rows = op.reshape(op.call(aten.arange.default, value.shape[0]), [-1, 1])
    columns = op.call(aten.arange.default, value.shape[1])
    return op.cast(op.call(aten.eq.Tensor, op.call(aten.add.Tensor, rows, diagonal), columns), dtype)
