"""Convolutions, and the padding that they share with pooling."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_CONV = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def spatial(op: Operation, name: str, rank: int, default: int = 1) -> list[int]:
    """An attribute with one entry for each spatial axis."""
    found = op.attributes.integers(name)
    return [default] * rank if found is None else found


def read_pads(
    op: Operation, value: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """(before, after) for each spatial axis, from `pads` or `auto_pad`."""
    rank = len(kernel)
    mode = op.attributes.text("auto_pad", "NOTSET")
    pads = op.attributes.integers("pads")
    if mode in ("NOTSET", ""):
        pads = pads or [0] * 2 * rank
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise op.refuse(f"auto_pad {mode!r} does not exist")
    before, after = [], []
    for size, width, stride, dilation in zip(value.shape[2:], kernel, strides, dilations, strict=True):
        if not isinstance(size, int):
            raise op.refuse("auto_pad over a dynamic size is not imported; export it with explicit pads")
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before, after


def pad_first(
    op: Operation, value: Tensor, before: list[int], after: list[int], fill: float = 0.0
) -> tuple[Tensor, list[int]]:
    """Padding that is not the same on both sides becomes an operator of its own; returns the value and what is left."""
    if before == after:
        return value, before
    flat = [pad for pair in zip(before[::-1], after[::-1], strict=True) for pad in pair]
    return op.call(aten.pad.default, value, flat, "constant", fill), [0] * len(before)


@operator("Conv")
def conv(op: Operation, value: Present, weight: Present, bias: Present | None = None) -> Tensor:
    value, weight = op.tensor(value), op.tensor(weight)
    rank = weight.ndim - 2
    if not 1 <= rank <= 3:
        raise op.refuse(f"a convolution over {rank} axes is not imported")
    op.attributes.ignore("kernel_shape")  # the weight has it
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    before, after = read_pads(op, value, list(weight.shape[2:]), strides, dilations)
    value, pads = pad_first(op, value, before, after)
    return convolved(op, value, weight, bias, strides, pads, dilations, op.attributes.integer("group", 1))


def convolved(
    op: Operation, value: Tensor, weight: Tensor, bias: Value, strides: list[int], pads: list[int],
    dilations: list[int], groups: int = 1,
) -> Tensor:  # fmt: skip
    return op.call(_CONV[len(strides) - 1], value, weight, bias, strides, pads, dilations, groups)


@operator("ConvTranspose")
def conv_transpose(op: Operation, value: Present, weight: Present, bias: Present | None = None) -> Tensor:
    value, weight = op.tensor(value), op.tensor(weight)
    rank = weight.ndim - 2
    if not 1 <= rank <= 3:
        raise op.refuse(f"a convolution over {rank} axes is not imported")
    op.attributes.ignore("kernel_shape")
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    extra, groups = spatial(op, "output_padding", rank, 0), op.attributes.integer("group", 1)
    widths = list(weight.shape[2:])
    before, after = _cut(op, value, widths, strides, dilations, extra)
    settings = weight, bias, strides
    if before == after and min(before) >= 0:
        return op.call(_TRANSPOSED[rank - 1], value, *settings, before, extra, groups, dilations)
    extra = [more + max(-last, 0) for more, last in zip(extra, after, strict=True)]
    result = op.call(_TRANSPOSED[rank - 1], value, *settings, [0] * rank, extra, groups, dilations)
    if min(before) < 0:
        raise op.refuse("ConvTranspose with pads below 0, which its output_shape asks for, is not imported")
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        if first or last > 0:
            result = op.call(aten.slice.Tensor, result, axis + 2, first, result.shape[axis + 2] - max(last, 0))
    return result


def _cut(
    op: Operation, value: Tensor, widths: list[Any], strides: list[int], dilations: list[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    """What is cut off the full result before and after each axis: `pads`, or as much as makes the size asked for."""
    rank, mode = len(widths), op.attributes.text("auto_pad", "NOTSET")
    pads, wanted = spatial(op, "pads", 2 * rank, 0), op.attributes.integers("output_shape")
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER", ""):
        raise op.refuse(f"auto_pad {mode!r} does not exist")
    same = mode.startswith("SAME")
    if wanted is None and not same:
        return (pads[:rank], pads[rank:]) if mode != "VALID" else ([0] * rank, [0] * rank)
    before, after = [], []
    for axis in range(rank):
        full = strides[axis] * (value.shape[axis + 2] - 1) + extra[axis] + (widths[axis] - 1) * dilations[axis] + 1
        target = value.shape[axis + 2] * strides[axis] if wanted is None else wanted[axis - rank]
        total = full - target
        if not isinstance(total, int):
            raise op.refuse("the output_shape of ConvTranspose of a dynamic size is not imported; use pads")
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before, after


@operator("Col2Im")
def fold(op: Operation, value: Present, image: Present, block: Present) -> Tensor:
    """Blocks [N, C * elements, blocks] added up to images [N, C, ...]; what lies in the padding is left out."""
    sizes, kernel = op.integers(image, "the image_shape of Col2Im"), op.integers(block, "the block_shape of Col2Im")
    rank, value = len(kernel), op.tensor(value)
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    pads = spatial(op, "pads", 2 * rank, 0)
    if rank == 2 and pads[:2] == pads[2:]:
        return op.call(aten.col2im.default, value, sizes, kernel, dilations, pads[:2], strides)
    wide = [size + a + b for size, a, b in zip(sizes, pads[:rank], pads[rank:], strict=True)]
    places = torch.zeros(1, 1, dtype=torch.int64)  # [elements, blocks]
    for size, width, stride, dilation in zip(wide, kernel, strides, dilations, strict=True):
        blocks = torch.arange((size - (width - 1) * dilation - 1) // stride + 1) * stride
        own = torch.arange(width)[:, None] * dilation + blocks
        both = places[:, None, :, None] * size + own[None, :, None, :]
        places = both.reshape(len(places) * width, -1)
    batch, channels = value.shape[0], value.shape[1] // math.prod(kernel)
    index = op.emitter.attribute(op.emitter.weights.add("places", places.reshape(-1), trainable=False))
    flat = op.call(aten.full.default, [batch, channels, math.prod(wide)], 0, dtype=value.dtype)
    flat = op.call(aten.index_add.default, flat, 2, index, op.reshape(value, [batch, channels, places.numel()]))
    result = op.reshape(flat, [batch, channels, *wide])
    for axis in range(rank):
        if pads[axis] or pads[axis + rank]:
            result = op.call(aten.slice.Tensor, result, axis + 2, pads[axis], pads[axis] + sizes[axis])
    return result
