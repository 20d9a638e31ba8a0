"""Pooling."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.convolution import pad_first, read_pads, spatial
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten

_MAX = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_AVERAGE = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


@operator("MaxPool")
def max_pool(op: Operation, value: Present) -> Tensor:
    value = op.tensor(value)
    kernel = _kernel(op)
    rank = len(kernel)
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    before, after = read_pads(op, value, kernel, strides, dilations)
    ceil = bool(op.attributes.integer("ceil_mode"))
    op.attributes.ignore("storage_order")  # of the second output
    if op.outputs > 1:
        raise op.refuse("the indices of MaxPool are not imported")
    dtype = value.dtype
    if dtype in (torch.uint8, torch.int8):
        value = op.cast(value, torch.float32)
    elif not dtype.is_floating_point:
        raise op.refuse("MaxPool over integers of over 8 bits is not imported; cast to float around it")
    if any(2 * pad > width for pad, width in zip(before, kernel, strict=True)):
        value, pads = _always_pad(op, value, before, after)
    else:
        value, pads = pad_first(op, value, before, after, float("-inf"))
    return op.cast(op.call(_MAX[rank - 1], value, kernel, strides, pads, dilations, ceil), dtype)


def _always_pad(op: Operation, value: Tensor, before: list[int], after: list[int]) -> tuple[Tensor, list[int]]:
    """PyTorch refuses padding over half the kernel inside the operator."""
    flat = [pad for pair in zip(before[::-1], after[::-1], strict=True) for pad in pair]
    return op.call(aten.pad.default, value, flat, "constant", float("-inf")), [0] * len(before)


@operator("AveragePool")
def average_pool(op: Operation, value: Present) -> Tensor:
    value = op.tensor(value)
    kernel = _kernel(op)
    rank = len(kernel)
    strides, dilations = spatial(op, "strides", rank), spatial(op, "dilations", rank)
    before, after = read_pads(op, value, kernel, strides, dilations)
    ceil, count = bool(op.attributes.integer("ceil_mode")), bool(op.attributes.integer("count_include_pad"))
    if dilations != [1] * rank:
        raise op.refuse("AveragePool with dilations is not imported")
    if before != after and (not count or ceil):
        raise op.refuse("AveragePool with pads that differ between both sides is only imported with count_include_pad")
    if any(2 * pad > width for pad, width in zip(before, kernel, strict=True)):
        raise op.refuse("AveragePool with pads over half the kernel is not imported")
    value, pads = pad_first(op, value, before, after)
    return op.call(_AVERAGE[rank - 1], value, kernel, strides, pads, ceil, count)


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(op: Operation, value: Present) -> Tensor:
    along = list(range(2, value.ndim))
    if op.name == "GlobalMaxPool":
        return op.call(aten.amax.default, value, along, True)
    if value.ndim == 4:
        return op.call(aten.adaptive_avg_pool2d.default, value, [1, 1])
    return op.call(aten.mean.dim, value, along, True)


def _kernel(op: Operation) -> list[int]:
    kernel = op.attributes.integers("kernel_shape")
    if kernel is None or not 1 <= len(kernel) <= 3:
        raise op.refuse("pooling needs a kernel_shape over one to three axes")
    return kernel
