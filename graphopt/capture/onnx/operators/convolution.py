"""Convolutions, and the padding that they share with pooling."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

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
    groups = op.attributes.integer("group", 1)
    return op.call(_CONV[rank - 1], value, weight, bias, strides, pads, dilations, groups)


@operator("ConvTranspose")
def conv_transpose(op: Operation, value: Present, weight: Present, bias: Present | None = None) -> Tensor:
    value, weight = op.tensor(value), op.tensor(weight)
    rank = weight.ndim - 2
    op.attributes.ignore("kernel_shape")
    if op.attributes.integers("output_shape") is not None or op.attributes.text("auto_pad", "NOTSET") != "NOTSET":
        raise op.refuse("output_shape and auto_pad of ConvTranspose are not imported; export it with explicit pads")
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    pads: Any = spatial(op, "pads", 2 * rank, 0)
    extra = spatial(op, "output_padding", rank, 0)
    before, after = pads[:rank], pads[rank:]
    if before != after:
        raise op.refuse("pads of ConvTranspose that differ between both sides are not imported")
    groups = op.attributes.integer("group", 1)
    return op.call(_TRANSPOSED[rank - 1], value, weight, bias, strides, before, extra, groups, dilations)
