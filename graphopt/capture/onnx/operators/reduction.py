"""Reductions along axes."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator(
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceProd",
)  # fmt: skip
def reduce_(op: Operation, value: Present, axes: Value = None) -> Tensor:
    value = op.tensor(value)
    chosen, keep = op.axes(axes, value.ndim), bool(op.attributes.integer("keepdims", 1))
    nothing = bool(op.attributes.integer("noop_with_empty_axes"))
    prepared = _prepare(op, value)
    if not chosen and nothing:
        if op.name == "ReduceL2":
            return op.call(aten.abs.default, value)
        return op.call(aten.log.default, prepared) if op.name == "ReduceLogSum" else prepared
    along = chosen or list(range(value.ndim))
    match op.name:
        case "ReduceMean":
            return op.call(aten.mean.dim, prepared, along, keep)
        case "ReduceMax" | "ReduceMin":
            target = aten.amax.default if op.name == "ReduceMax" else aten.amin.default
            if any(isinstance(value.shape[axis], int) and value.shape[axis] == 0 for axis in along):
                return _of_nothing(op, value, along, keep)
            return op.call(target, prepared, along, keep)
        case "ReduceLogSumExp":
            return op.call(aten.logsumexp.default, prepared, along, keep)
        case "ReduceProd":
            for axis in sorted(along, reverse=True):
                prepared = op.call(aten.prod.dim_int, prepared, axis, keep, dtype=value.dtype)
            return prepared
    total: Tensor = op.call(aten.sum.dim_IntList, prepared, along, keep, **_same_type(value))
    if op.name == "ReduceL2":
        return op.cast(op.call(aten.sqrt.default, total), value.dtype)
    return op.call(aten.log.default, total) if op.name == "ReduceLogSum" else total


def _of_nothing(op: Operation, value: Tensor, along: list[int], keep: bool) -> Tensor:
    """The least or the largest number of the type, which the standard gives for no elements."""
    if value.dtype == torch.bool:
        least, most = 0.0, 1.0
    elif value.dtype.is_floating_point:
        least, most = float("-inf"), float("inf")
    else:
        least, most = torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max
    sizes = [1 if axis in along else size for axis, size in enumerate(value.shape) if keep or axis not in along]
    return op.call(aten.full.default, sizes, least if op.name == "ReduceMax" else most, dtype=value.dtype)


def _prepare(op: Operation, value: Tensor) -> Tensor:
    match op.name:
        case "ReduceL1":
            return op.call(aten.abs.default, value)
        case "ReduceL2" | "ReduceSumSquare":
            return op.call(aten.mul.Tensor, value, value)
    return value


def _same_type(value: Tensor) -> dict[str, torch.dtype]:
    """PyTorch widens sums of integers unless told."""
    return {} if value.dtype.is_floating_point else {"dtype": value.dtype}
