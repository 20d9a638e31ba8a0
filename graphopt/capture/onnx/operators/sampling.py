"""Images read between their elements: grids, regions, and convolutions whose windows are moved."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.convolution import spatial
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_MODES = {"linear": 0, "bilinear": 0, "nearest": 1, "cubic": 2, "bicubic": 2}
_PADDING = {"zeros": 0, "border": 1, "reflection": 2}
_SAMPLERS = {4: aten.grid_sampler_2d.default, 5: aten.grid_sampler_3d.default}


@operator("GridSample")
def grid_sample(op: Operation, value: Present, grid: Present) -> Tensor:
    """value [N, C, ...], grid [N, ..., axes] from -1 to 1."""
    mode, padding = op.attributes.text("mode", "linear"), op.attributes.text("padding_mode", "zeros")
    corners, rank = bool(op.attributes.integer("align_corners")), value.ndim
    if mode not in _MODES or padding not in _PADDING:
        raise op.refuse(f"GridSample with mode {mode!r} and padding {padding!r} does not exist")
    if rank not in _SAMPLERS or (rank == 5 and _MODES[mode] == 2):
        raise op.refuse(f"GridSample with mode {mode} over {rank - 2} axes is not imported")
    return op.call(_SAMPLERS[rank], value, grid, _MODES[mode], _PADDING[padding], corners)


@operator("RoiAlign")
def region_align(op: Operation, value: Present, regions: Present, samples: Present) -> Tensor:
    """value [N, C, H, W], regions [R, 4] of x1, y1, x2, y2 in the image `samples` [R] -> [R, C, height, width].

    An image is read at each place by shares of its rows and of its columns, so by two products with matrices.
    """
    value, regions = op.tensor(value), op.tensor(regions)
    mode, points = op.attributes.text("mode", "avg"), op.attributes.integer("sampling_ratio")
    sizes = op.attributes.integer("output_height", 1), op.attributes.integer("output_width", 1)
    default = "half_pixel" if op.opset >= 16 else "output_half_pixel"
    halves = op.attributes.text("coordinate_transformation_mode", default) == "half_pixel"
    if points <= 0 or mode != "avg":
        raise op.refuse("RoiAlign is only imported with mode avg and a sampling_ratio over 0; export it so")
    scaled = op.call(aten.mul.Tensor, regions, op.attributes.number("spatial_scale", 1.0))
    if halves:
        scaled = op.call(aten.sub.Tensor, scaled, 0.5)
    shares = []
    for first, axis in ((1, 2), (0, 3)):
        start, end = (op.call(aten.select.int, scaled, 1, place) for place in (first, first + 2))
        length = op.call(aten.sub.Tensor, end, start)
        if not halves:
            length = op.call(aten.clamp.default, length, 1.0)
        shares.append(_shares(op, start, length, sizes[axis - 2], points, value.shape[axis]))
    images = op.call(aten.index_select.default, value, 0, op.cast(samples, torch.int64))
    rows, columns = (op.call(aten.unsqueeze.default, item, 1) for item in shares)
    read = op.call(aten.matmul.default, rows, images)
    read = op.call(aten.matmul.default, read, op.call(aten.transpose.int, columns, 2, 3))
    cells = op.reshape(read, [read.shape[0], read.shape[1], sizes[0], points, sizes[1], points])
    return op.call(aten.mean.dim, cells, [3, 5])


def _shares(op: Operation, start: Tensor, length: Tensor, cells: int, points: int, size: Any) -> Tensor:
    """[R, cells * points, size]: the share of each row of the image at each place."""
    step = op.call(aten.div.Tensor, length, float(cells))
    numbers = op.call(aten.arange.default, cells * points, dtype=start.dtype)
    numbers = op.call(aten.div.Tensor, op.call(aten.add.Tensor, numbers, 0.5), float(points))
    across = op.call(aten.mul.Tensor, op.reshape(step, [-1, 1]), numbers)
    places = op.call(aten.add.Tensor, op.reshape(start, [-1, 1]), across)
    inside = op.call(
        aten.bitwise_and.Tensor, op.call(aten.ge.Scalar, places, -1.0), op.call(aten.le.Scalar, places, size)
    )
    places = op.call(aten.clamp.default, places, 0, size - 1)
    rows = op.call(aten.arange.default, size, dtype=start.dtype)
    apart = op.call(aten.abs.default, op.call(aten.sub.Tensor, op.call(aten.unsqueeze.default, places, 2), rows))
    share = op.call(aten.relu.default, op.call(aten.rsub.Scalar, apart, 1.0))
    return op.call(aten.mul.Tensor, share, op.call(aten.unsqueeze.default, op.cast(inside, start.dtype), 2))


@operator("DeformConv")
def deformed_convolution(
    op: Operation, value: Present, weight: Present, offset: Present, bias: Value = None, mask: Value = None
) -> Tensor:
    """value [N, C, H, W], weight [O, C / group, kh, kw], offset [N, groups kh kw 2, oh, ow] of y, x, mask without 2.

    Outside the image are zeros.
    """
    dtype, value, weight = value.dtype, op.cast(value, torch.float64), op.cast(weight, torch.float64)
    offset = op.cast(offset, torch.float64)  # places are rounded to the grid of the sampler, which shows in float32
    if value.ndim != 4:
        raise op.refuse(f"DeformConv over {value.ndim - 2} axes is not imported")
    op.attributes.ignore("kernel_shape")
    groups, moved = op.attributes.integer("group", 1), op.attributes.integer("offset_group", 1)
    strides, dilations = spatial(op, "strides", 2), spatial(op, "dilations", 2)
    pads = spatial(op, "pads", 4, 0)
    batch, channels, *image = value.shape
    kernel, out = list(weight.shape[2:]), list(offset.shape[2:])
    taps = math.prod(kernel)
    moves = op.reshape(offset, [batch * moved, *kernel, 2, *out])
    places = []
    for axis in (1, 0):  # x before y
        steps = [_steps(op, kernel[axis], dilations[axis], 1 + axis, -pads[axis], value.dtype)]
        steps.append(_steps(op, out[axis], strides[axis], 3 + axis, 0, value.dtype))
        place = op.call(aten.add.Tensor, op.call(aten.select.int, moves, 3, axis), op.call(aten.add.Tensor, *steps))
        scaled = op.call(aten.div.Tensor, op.call(aten.add.Tensor, op.call(aten.mul.Tensor, place, 2), 1), image[axis])
        places.append(op.call(aten.sub.Tensor, scaled, 1))
    grid = op.reshape(op.call(aten.stack.default, places, -1), [batch * moved, taps * out[0], out[1], 2])
    images = op.reshape(value, [batch * moved, channels // moved, *image])
    read = op.call(aten.grid_sampler_2d.default, images, grid, 0, 0, False)
    if mask is not None:
        read = op.call(aten.mul.Tensor, read, op.reshape(mask, [batch * moved, 1, taps * out[0], out[1]]))
    read = op.reshape(read, [batch, groups, channels // groups * taps, out[0] * out[1]])
    flat = op.reshape(weight, [groups, weight.shape[0] // groups, channels // groups * taps])
    result = op.reshape(op.call(aten.matmul.default, flat, read), [batch, weight.shape[0], *out])
    result = result if bias is None else op.call(aten.add.Tensor, result, op.reshape(bias, [-1, 1, 1]))
    return op.cast(result, dtype)


def _steps(op: Operation, count: Any, step: int, axis: int, first: int, dtype: torch.dtype) -> Tensor:
    numbers = op.call(aten.mul.Tensor, op.call(aten.arange.default, count, dtype=dtype), step)
    shape = [-1 if place == axis else 1 for place in range(5)]
    return op.reshape(op.call(aten.add.Tensor, numbers, first), shape)
