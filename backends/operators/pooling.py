"""Pooling: the largest element or the mean of every window."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of
from graphopt.backends.operators.windows import each_axis, load_at, surrounded
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Shape, Size, shape_of
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[["Lowering", Node], Any]


def _pooled(
    lowering: Lowering,
    node: Node,
    source: View,
    window: list[int],
    strides: list[int],
    dilations: list[int],
    combine: str,
) -> View:
    """Combine the elements of every window."""
    meta = node.meta["val"]
    shape, dtype = shape_of(meta), DTYPES[meta.dtype]
    lead = len(shape) - len(window)

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        at = [index.axis(n) for n in range(lead)]
        at += [index.axis(lead + n) * strides[n] + tap * dilations[n] for n, tap in enumerate(reduced)]
        return load_at(kernel, source, tuple(at))

    return reduce_generic(lowering, f"{combine}_pool", shape, dtype, tuple(window), (source,), element, combine)


def _beyond(
    view: View, shape: Shape, window: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> list[int]:
    """Elements needed after each axis: the padding, and in ceil mode what the last window sticks out further."""
    lead = len(shape) - len(window)
    after = []
    for n, (size, pad, stride) in enumerate(zip(window, pads, strides, strict=True)):
        reach = (shape[lead + n] - 1) * stride + dilations[n] * (size - 1) + 1 - pad - view.shape[lead + n]
        after.append(max(pad, int(reach)) if isinstance(reach, int) or reach.is_number else max(pad, stride - 1 + pad))
    return after


def _max_pool(spatial: int) -> Lower:
    def lower(lowering: Lowering, node: Node) -> View:
        x, window, stride, padding, dilation, _ = arguments(node).values()
        size = each_axis(window, spatial)
        strides, dilations, pads = (
            each_axis(stride or size, spatial),
            each_axis(dilation, spatial),
            each_axis(padding, spatial),
        )
        view, shape = lowering.view(x), shape_of(node.meta["val"])
        if view.dtype not in ("float32", "float64", "float16"):
            raise CompileError(f"{node.name} pools {view.dtype}; floats have a lowering")
        source = surrounded(lowering, view, pads, _beyond(view, shape, size, strides, dilations, pads), -math.inf)
        return _pooled(lowering, node, source, size, strides, dilations, "max")

    return lower


def _average_pool(spatial: int) -> Lower:
    """Windows that stick out divide by what they cover, with the padding or without."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        x, window, stride, padding, _, include, *divisor = arguments(node).values()
        size = each_axis(window, spatial)
        strides, pads, ones = each_axis(stride or size, spatial), each_axis(padding, spatial), [1] * spatial
        view, shape = lowering.view(x), shape_of(node.meta["val"])
        source = surrounded(lowering, view, pads, _beyond(view, shape, size, strides, ones, pads))
        total = _pooled(lowering, node, source, size, strides, ones, "sum")
        lead = len(shape) - spatial

        def covered(kernel: Kernel, index: Index) -> Any:
            count = int64(1)
            for n in range(spatial):
                extent = kernel.size(view.shape[lead + n])
                start = index.axis(lead + n) * strides[n] - pads[n]
                end = tirx.min(start + size[n], extent + pads[n])
                if not include:
                    start, end = tirx.max(start, int64(0)), tirx.min(end, extent)
                count = count * (end - start)
            return count

        def element(kernel: Kernel, index: Index) -> Any:
            count = int64(int(divisor[0])) if divisor and divisor[0] else covered(kernel, index)
            value = convert(kernel.load(total, index), computed_in(total.dtype))
            return convert(value / count.astype(dtype_of(value)), total.dtype)

        return Lazy(shape, total.dtype, (total,), element)

    return lower


def _adaptive_average_pool(spatial: int) -> Lower:
    """Window i covers floor(i S / O) up to ceil((i + 1) S / O)."""

    def lower(lowering: Lowering, node: Node) -> View | Lazy:
        source = lowering.view(node.args[0])
        meta = node.meta["val"]
        shape, dtype = shape_of(meta), DTYPES[meta.dtype]
        lead = len(shape) - spatial
        pairs = list(zip(source.shape[lead:], shape[lead:], strict=True))
        depth = tuple(_longest_window(size, count) for size, count in pairs)

        def bounds(kernel: Kernel, index: Index, n: int) -> tuple[Any, Any]:
            size, count = (kernel.size(s) for s in pairs[n])
            at = index.axis(lead + n)
            return tirx.truncdiv(at * size, count), tirx.truncdiv((at + 1) * size + count - 1, count)

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            axes, inside = [index.axis(n) for n in range(lead)], []
            for n, tap in enumerate(reduced):
                start, end = bounds(kernel, index, n)
                inside.append(start + tap < end)
                axes.append(tirx.min(start + tap, end - 1))
            value = convert(load_at(kernel, source, tuple(axes)), computed_in(dtype))
            return tirx.Select(tirx.all(*inside), value, tirx.const(0, dtype_of(value)))

        total = reduce_generic(lowering, "adaptive_pool", shape, dtype, depth, (source,), element, "sum")

        def mean(kernel: Kernel, index: Index) -> Any:
            value, count = convert(kernel.load(total, index), computed_in(dtype)), int64(1)
            for n in range(spatial):
                start, end = bounds(kernel, index, n)
                count = count * (end - start)
            return convert(value / count.astype(dtype_of(value)), dtype)

        return Lazy(shape, dtype, (total,), mean, sizes=source.shape)

    return lower


def _longest_window(size: Size, count: Size) -> Size:
    if isinstance(size, int) and isinstance(count, int) and size % count == 0:
        return size // count
    if count == 1:
        return size
    if not isinstance(size, int) or not isinstance(count, int):
        raise CompileError(f"pooling {size} elements to {count} has no lowering; give fixed sizes or pool to 1")
    return -(-size // count) + 1


TABLE: dict[Any, Callable[..., Any]] = {
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.avg_pool1d.default: _average_pool(1),
    aten.avg_pool2d.default: _average_pool(2),
    aten.avg_pool3d.default: _average_pool(3),
    aten.adaptive_avg_pool1d.default: _adaptive_average_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool(2),
}
