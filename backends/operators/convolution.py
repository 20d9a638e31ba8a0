"""Convolution and pooling through the generic kernel: correct for every shape, listed as slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of
from graphopt.backends.operators.indexing import padded
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Shape, Size, shape_of
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[["Lowering", Node], Any]


def _each(value: Any, count: int) -> list[int]:
    """One number for all spatial axes, or one for each."""
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return items * count if len(items) == 1 else items


def _extended(view: View, before: Sequence[int], after: Sequence[int]) -> Shape:
    lead = len(view.shape) - len(before)
    grown = [size + b + a for size, b, a in zip(view.shape[lead:], before, after, strict=True)]
    return (*view.shape[:lead], *grown)


def _surrounded(lowering: Lowering, x: Any, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> View:
    """`x` in memory with `fill` around its last axes."""
    view = lowering.view(x)
    if not any(before) and not any(after):
        return view
    pairs = [p for pair in reversed(list(zip(before, after, strict=True))) for p in pair]
    return lowering.store(padded(view, pairs, fill, _extended(view, before, after)))


def _padding(node: Node, argument: Any, taps: Sequence[int], dilations: Sequence[int]) -> tuple[list[int], list[int]]:
    """Elements before and after each spatial axis; "same" puts the odd one after."""
    if argument == "valid":
        return [0] * len(taps), [0] * len(taps)
    if argument == "same":
        totals = [d * (t - 1) for t, d in zip(taps, dilations, strict=True)]
        return [t // 2 for t in totals], [t - t // 2 for t in totals]
    each = _each(argument, len(taps))
    return each, each


def _convolution(spatial: int) -> Lower:
    """x [N, C, ...] or [C, ...], weight [O, C / groups, ...], bias [O] or none."""

    def lower(lowering: Lowering, node: Node) -> Any:
        x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
        filters = lowering.view(weight)
        strides, dilations = _each(stride, spatial), _each(dilation, spatial)
        before, after = _padding(node, padding, [int(s) for s in filters.shape[2:]], dilations)
        source = _batched(lowering, _surrounded(lowering, x, before, after), spatial)
        meta = node.meta["val"]
        result, dtype = shape_of(meta), DTYPES[meta.dtype]
        shape = result if len(result) == spatial + 2 else (1, *result)
        outputs_each = int(filters.shape[0]) // int(groups)

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            channel, *taps = reduced
            batch, output = index.axis(0), index.axis(1)
            at = [index.axis(2 + n) * strides[n] + tap * dilations[n] for n, tap in enumerate(taps)]
            first = _quotient(output, outputs_each) * int(filters.shape[1]) if groups != 1 else 0
            left = _load(kernel, source, (batch, channel + first, *at))
            right = _load(kernel, filters, (output, channel, *taps))
            return convert(left, computed_in(dtype)) * convert(right, computed_in(dtype))

        depth, reads = filters.shape[1:], (source, filters)
        stored = reduce_generic(lowering, f"conv{spatial}d", shape, dtype, depth, reads, element, "sum")
        return reshape(lowering, _with_bias(lowering, stored, bias), result)

    return lower


def _transposed(spatial: int) -> Lower:
    """conv_transpose: x [N, C, ...], weight [C, O / groups, ...]; each output gathers the taps that reach it."""

    def lower(lowering: Lowering, node: Node) -> Any:
        x, weight, bias, stride, padding, _, groups, dilation = arguments(node).values()
        filters = lowering.view(weight)
        source = _batched(lowering, lowering.view(x), spatial)
        strides, pads, dilations = (_each(v, spatial) for v in (stride, padding, dilation))
        meta = node.meta["val"]
        result, dtype = shape_of(meta), DTYPES[meta.dtype]
        shape = result if len(result) == spatial + 2 else (1, *result)
        inputs_each, outputs_each = int(filters.shape[0]) // int(groups), int(filters.shape[1])

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            channel, *taps = reduced
            output, at, reached = index.axis(1), [], []
            for n, tap in enumerate(taps):
                distance = index.axis(2 + n) + pads[n] - tap * dilations[n]
                position, last = (
                    _quotient(tirx.max(distance, _int64(0)), strides[n]),
                    kernel.size(source.shape[2 + n]) - 1,
                )
                reached += [distance >= 0, tirx.EQ(position * strides[n], distance), position <= last]
                at.append(tirx.min(position, last))
            group = _quotient(output, outputs_each)
            left = _load(kernel, source, (index.axis(0), group * inputs_each + channel, *at))
            right = _load(kernel, filters, (group * inputs_each + channel, output - group * outputs_each, *taps))
            product = convert(left, computed_in(dtype)) * convert(right, computed_in(dtype))
            return tirx.Select(tirx.all(*reached), product, tirx.const(0, dtype_of(product)))

        depth, reads = (inputs_each, *filters.shape[2:]), (source, filters)
        stored = reduce_generic(lowering, f"conv_transpose{spatial}d", shape, dtype, depth, reads, element, "sum")
        return reshape(lowering, _with_bias(lowering, stored, bias), result)

    return lower


def _with_bias(lowering: Lowering, stored: View, bias: Any) -> View | Lazy:
    if bias is None:
        return stored
    added = lowering.contiguous(bias)

    def element(kernel: Kernel, index: Index) -> Any:
        return kernel.load(stored, index) + kernel.flat(added.storage)[index.axis(1)]

    return Lazy(stored.shape, stored.dtype, (stored, added), element)


def _batched(lowering: Lowering, view: View, spatial: int) -> View:
    """A batch axis of 1 where there is none."""
    return view if len(view.shape) == spatial + 2 else lowering.view(reshape(lowering, view, (1, *view.shape)))


def _load(kernel: Kernel, value: View, axes: tuple[Any, ...]) -> Any:
    return kernel.load(value, Index(value.shape, kernel.sizes, axes=axes))


def _int64(number: int) -> Any:
    return tirx.const(number, "int64")


def _quotient(position: Any, by: int) -> Any:
    return position if by == 1 else tirx.truncdiv(position, _int64(by))


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
        return _load(kernel, source, tuple(at))

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
        size = _each(window, spatial)
        strides, dilations, pads = _each(stride or size, spatial), _each(dilation, spatial), _each(padding, spatial)
        view, shape = lowering.view(x), shape_of(node.meta["val"])
        if view.dtype not in ("float32", "float64", "float16"):
            raise CompileError(f"{node.name} pools {view.dtype}; floats have a lowering")
        source = _surrounded(lowering, view, pads, _beyond(view, shape, size, strides, dilations, pads), -math.inf)
        return _pooled(lowering, node, source, size, strides, dilations, "max")

    return lower


def _average_pool(spatial: int) -> Lower:
    """Windows that stick out divide by what they cover, with the padding or without."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        x, window, stride, padding, _, include, *divisor = arguments(node).values()
        size = _each(window, spatial)
        strides, pads, ones = _each(stride or size, spatial), _each(padding, spatial), [1] * spatial
        view, shape = lowering.view(x), shape_of(node.meta["val"])
        source = _surrounded(lowering, view, pads, _beyond(view, shape, size, strides, ones, pads))
        total = _pooled(lowering, node, source, size, strides, ones, "sum")
        lead = len(shape) - spatial

        def covered(kernel: Kernel, index: Index) -> Any:
            count = _int64(1)
            for n in range(spatial):
                extent = kernel.size(view.shape[lead + n])
                start = index.axis(lead + n) * strides[n] - pads[n]
                end = tirx.min(start + size[n], extent + pads[n])
                if not include:
                    start, end = tirx.max(start, _int64(0)), tirx.min(end, extent)
                count = count * (end - start)
            return count

        def element(kernel: Kernel, index: Index) -> Any:
            count = _int64(int(divisor[0])) if divisor and divisor[0] else covered(kernel, index)
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
            value = convert(_load(kernel, source, tuple(axes)), computed_in(dtype))
            return tirx.Select(tirx.all(*inside), value, tirx.const(0, dtype_of(value)))

        total = reduce_generic(lowering, "adaptive_pool", shape, dtype, depth, (source,), element, "sum")

        def mean(kernel: Kernel, index: Index) -> Any:
            value, count = convert(kernel.load(total, index), computed_in(dtype)), _int64(1)
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
    **{getattr(aten, f"conv{n}d").default: _convolution(n) for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: _convolution(n) for n in (1, 2, 3)},
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.avg_pool1d.default: _average_pool(1),
    aten.avg_pool2d.default: _average_pool(2),
    aten.avg_pool3d.default: _average_pool(3),
    aten.adaptive_avg_pool1d.default: _adaptive_average_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool(2),
}
