"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.convolution import convolved, read_pads, spatial
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_MAX = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_INDICES = {2: aten.max_pool2d_with_indices.default, 3: aten.max_pool3d_with_indices.default}
_AVERAGE = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


@dataclass(frozen=True)
class _Windows:
    """What a pool looks at, one number for each spatial axis; `ceil`: windows may reach over the end."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    ceil: bool

    @property
    def fit_torch(self) -> bool:
        """Whether PyTorch pads so inside its operator."""
        pads = zip(self.before, self.kernel, strict=True)
        return self.before == self.after and all(2 * pad <= width for pad, width in pads)


def _windows(op: Operation, value: Tensor) -> _Windows:
    kernel = op.attributes.integers("kernel_shape")
    if kernel is None or not 1 <= len(kernel) <= 3:
        raise op.refuse("pooling needs a kernel_shape over one to three axes")
    strides, dilations = spatial(op, "strides", len(kernel)), spatial(op, "dilations", len(kernel))
    before, after = read_pads(op, value, kernel, strides, dilations)
    return _Windows(kernel, strides, dilations, before, after, bool(op.attributes.integer("ceil_mode")))


def _reach(op: Operation, value: Tensor, windows: _Windows) -> list[int]:
    """The elements after the padding that windows reach over; a window does not begin behind the input."""
    if not windows.ceil:
        return [0] * len(windows.kernel)
    reach = []
    for axis, width in enumerate(windows.kernel):
        size, stride = value.shape[axis + 2], windows.strides[axis]
        if not isinstance(size, int):
            raise op.refuse("ceil_mode over a dynamic size with these pads is not imported; give that axis a number")
        span = (width - 1) * windows.dilations[axis] + 1
        padded = size + windows.before[axis] + windows.after[axis]
        count = -(-(padded - span) // windows.strides[axis]) + 1
        if (count - 1) * stride >= size + windows.before[axis]:
            count -= 1
        reach.append((count - 1) * stride + span - padded)
    return reach


@operator("MaxPool")
def max_pool(op: Operation, value: Present) -> Any:
    value = op.tensor(value)
    windows, dtype = _windows(op, value), value.dtype
    columns = bool(op.attributes.integer("storage_order"))
    if dtype in (torch.uint8, torch.int8):
        value = op.cast(value, torch.float32)
    elif not dtype.is_floating_point:
        raise op.refuse("MaxPool over integers of over 8 bits is not imported; cast to float around it")
    if op.outputs > 1:
        largest, places = _with_places(op, value, windows, columns)
        return op.cast(largest, dtype), places
    pads, ceil = windows.before, windows.ceil
    if not windows.fit_torch:
        after = [a + b for a, b in zip(windows.after, _reach(op, value, windows), strict=True)]
        value, pads, ceil = _padded(op, value, windows.before, after, float("-inf")), [0] * len(pads), False
    target = _MAX[len(pads) - 1]
    return op.cast(op.call(target, value, windows.kernel, windows.strides, pads, windows.dilations, ceil), dtype)


def _padded(op: Operation, value: Tensor, before: Sequence[int], after: Sequence[int], fill: float) -> Tensor:
    flat = [pad for pair in zip(before[::-1], after[::-1], strict=True) for pad in pair]
    return op.call(aten.pad.default, value, flat, "constant", fill) if any(flat) else value


def _with_places(op: Operation, value: Tensor, windows: _Windows, columns: bool) -> tuple[Tensor, Tensor]:
    """The largest elements and their places among all elements of the input."""
    if not windows.fit_torch:
        raise op.refuse("indices of MaxPool with these pads are not imported; pad before it")
    shape, rank = value.shape, len(windows.kernel)
    if columns and rank > 2:
        raise op.refuse("storage_order of MaxPool over three axes is not imported")
    settings = [windows.kernel, windows.strides, windows.before, windows.dilations]
    if rank == 1:
        value = op.call(aten.unsqueeze.default, value, 2)
        settings = [[new, *given] for new, given in zip((1, 1, 0, 1), settings, strict=True)]
    largest, places = op.parts(_INDICES[max(rank, 2)], value, *settings, windows.ceil)
    if rank == 1:
        largest, places = (op.call(aten.squeeze.dims, item, [2]) for item in (largest, places))
    if columns and rank == 2:
        row = op.call(aten.div.Tensor_mode, places, shape[3], rounding_mode="floor")
        column = op.call(aten.remainder.Scalar, places, shape[3])
        places = op.call(aten.add.Tensor, op.call(aten.mul.Tensor, column, shape[2]), row)
    planes = op.call(aten.arange.default, shape[0] * shape[1])
    first = op.call(aten.mul.Tensor, planes, math.prod(shape[2:]))
    first = op.reshape(first, [shape[0], shape[1], *[1] * rank])
    return largest, op.call(aten.add.Tensor, places, first)


@operator("MaxUnpool")
def max_unpool(op: Operation, value: Present, places: Present, sizes: Value = None) -> Tensor:
    """Each element at its place, zeros elsewhere; places are those of an output without given sizes."""
    value = op.tensor(value)
    kernel = op.attributes.integers("kernel_shape") or []
    strides, pads = spatial(op, "strides", len(kernel)), spatial(op, "pads", 2 * len(kernel), 0)
    shape = list(value.shape[:2])
    for axis, width in enumerate(kernel):
        total = pads[axis] + pads[axis + len(kernel)]
        shape.append((value.shape[axis + 2] - 1) * strides[axis] - total + width)
    flat = op.call(aten.full.default, [math.prod(shape)], 0, dtype=value.dtype)
    flat = op.call(aten.scatter.src, flat, 0, op.reshape(places, [-1]), op.reshape(value, [-1]))
    result = op.reshape(flat, shape)
    if sizes is None:
        return result
    wanted = op.sizes(sizes, "the output_shape of MaxUnpool")
    return _padded(op, result, [0] * len(kernel), [b - a for a, b in zip(shape[2:], wanted[2:], strict=True)], 0.0)


@operator("AveragePool")
def average_pool(op: Operation, value: Present) -> Tensor:
    value = op.tensor(value)
    windows, count = _windows(op, value), bool(op.attributes.integer("count_include_pad"))
    is_plain = windows.dilations == [1] * len(windows.kernel)
    if is_plain and (windows.fit_torch or (count and not windows.ceil)):
        value, pads = value, windows.before
        if windows.before != windows.after or not windows.fit_torch:
            value, pads = _padded(op, value, windows.before, windows.after, 0.0), [0] * len(pads)
        target = _AVERAGE[len(windows.kernel) - 1]
        return op.call(target, value, windows.kernel, windows.strides, pads, windows.ceil, count)
    sums, numbers = _sums(op, value, windows, count)
    return op.call(aten.div.Tensor, sums, numbers)


def _sums(op: Operation, value: Tensor, windows: _Windows, padding_counts: bool) -> tuple[Tensor, Tensor]:
    """The sum of each window, and how many elements it has: each a convolution with ones."""
    reach = _reach(op, value, windows)
    rank, shape = len(windows.kernel), list(value.shape)
    after = [a + b for a, b in zip(windows.after, reach, strict=True)]
    ones = op.call(aten.full.default, [1, 1, *windows.kernel], 1.0, dtype=value.dtype)
    there = op.call(aten.full.default, [1, 1, *shape[2:]], 1.0, dtype=value.dtype)
    if padding_counts:
        there = _padded(op, there, windows.before, windows.after, 1.0)
        there = _padded(op, there, [0] * rank, reach, 0.0)
    else:
        there = _padded(op, there, windows.before, after, 0.0)
    planes = op.reshape(_padded(op, value, windows.before, after, 0.0), [shape[0] * shape[1], 1, *there.shape[2:]])
    sums, numbers = (
        convolved(op, item, ones, None, windows.strides, [0] * rank, windows.dilations) for item in (planes, there)
    )
    return op.reshape(sums, [*shape[:2], *sums.shape[2:]]), numbers


@operator("LpPool")
def lp_pool(op: Operation, value: Present) -> Tensor:
    """The root of the sum of powers in each window; opset 1 had a float for `p`."""
    value, order = op.tensor(value), op.attributes.integer("p", 2)
    powers = op.call(aten.pow.Tensor_Scalar, op.call(aten.abs.default, value), order)
    sums, _ = _sums(op, powers, _windows(op, value), False)
    return op.call(aten.pow.Tensor_Scalar, sums, 1.0 / order)


@operator("GlobalLpPool")
def global_lp_pool(op: Operation, value: Present) -> Tensor:
    value, order = op.tensor(value), op.attributes.integer("p", 2)
    return op.call(aten.linalg_vector_norm.default, value, order, list(range(2, value.ndim)), True)


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(op: Operation, value: Present) -> Tensor:
    along = list(range(2, value.ndim))
    if op.name == "GlobalMaxPool":
        return op.call(aten.amax.default, value, along, True)
    if value.ndim == 4:
        return op.call(aten.adaptive_avg_pool2d.default, value, [1, 1])
    return op.call(aten.mean.dim, value, along, True)
