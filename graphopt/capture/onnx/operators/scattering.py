"""Writing by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.indexing import from_start
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor
from graphopt.operators.quantization import along

aten = torch.ops.aten

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _reduction(op: Operation) -> str:
    name = op.attributes.text("reduction", "none")
    if name != "none" and name not in _REDUCTIONS:
        raise op.refuse(f"the reduction {name!r} is none of none, {', '.join(_REDUCTIONS)}")
    return name


@operator("ScatterElements", "Scatter")
def scatter_elements(op: Operation, value: Present, index: Present, updates: Present) -> Tensor:
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    index = from_start(op, index, value.shape[axis])
    reduction = _reduction(op)
    if reduction == "none":
        return op.call(aten.scatter.src, value, axis, index, updates)
    return op.call(aten.scatter_reduce.two, value, axis, index, updates, _REDUCTIONS[reduction])


@operator("ScatterND")
def scatter_nd(op: Operation, value: Present, index: Present, updates: Present) -> Tensor:
    value, index, reduction = op.tensor(value), op.tensor(index), _reduction(op)
    depth = index.shape[-1]
    if not isinstance(depth, int):
        raise op.refuse("the last axis of the indices of ScatterND is dynamic; give it a number")
    places = [op.call(aten.select.int, index, -1, item) for item in range(depth)]
    if reduction in ("none", "add"):
        return op.call(aten.index_put.default, value, places, updates, reduction == "add")
    return _combined(op, value, places, updates, reduction)


def _combined(op: Operation, value: Tensor, places: Sequence[Tensor], updates: Present, reduction: str) -> Tensor:
    """Rows of the leading axes, numbered through, with others multiplied in, or the larger or smaller of both."""
    sizes, width = value.shape[: len(places)], math.prod(value.shape[len(places) :])
    rows: list[Tensor] = []
    for axis, place in enumerate(places):
        stride = math.prod(sizes[axis + 1 :])
        rows.append(op.call(aten.mul.Tensor, from_start(op, place, sizes[axis]), stride))
    number = op.reshape(reduce(lambda a, b: op.call(aten.add.Tensor, a, b), rows), [-1, 1])
    flat, new = op.reshape(value, [math.prod(sizes), width]), op.reshape(updates, [number.shape[0], width])
    index = op.call(aten.expand.default, number, list(new.shape))
    done = op.call(aten.scatter_reduce.two, flat, 0, index, new, _REDUCTIONS[reduction])
    return op.reshape(done, list(value.shape))


@operator("TensorScatter")
def tensor_scatter(op: Operation, cache: Present, update: Present, starts: Present | None = None) -> Tensor:
    """cache [B, ..., T, ...] with update [B, ..., S, ...] written from starts [B] on, around the end if circular."""
    cache, update = op.tensor(cache), op.tensor(update)
    axis, mode = op.axis(op.attributes.integer("axis", -2), cache.ndim), op.attributes.text("mode", "linear")
    if mode not in ("linear", "circular"):
        raise op.refuse(f"mode {mode!r} of TensorScatter is neither linear nor circular")
    if axis == 0:
        raise op.refuse("TensorScatter along the first axis, which is that of samples, does not exist")
    index: Any = op.reshape(op.call(aten.arange.default, update.shape[axis]), along(axis, cache.ndim))
    if starts is not None:
        first = op.reshape(op.cast(starts, torch.int64), along(0, cache.ndim))
        index = op.call(aten.add.Tensor, index, first)
    if mode == "circular":
        index = op.call(aten.remainder.Scalar, index, cache.shape[axis])
    return op.call(aten.scatter.src, cache, axis, op.call(aten.expand.default, index, list(update.shape)), update)
