"""Convolution and pooling through the generic kernel: correct for every shape, listed as slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.indexing import padded
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Size, product, shape_of
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _list(value: Any, count: int) -> list[int]:
    """One number for all spatial axes, or one for each."""
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return items * count if len(items) == 1 else items


def _padded(lowering: Lowering, x: Any, padding: list[int], fill: Any) -> View:
    """`x` with its spatial axes padded on both sides, in memory; `x` itself where there is nothing to pad."""
    view = lowering.contiguous(x)
    if not any(padding):
        return view
    rank = len(view.shape)
    shape = tuple(
        size + 2 * padding[number - (rank - len(padding))] if number >= rank - len(padding) else size
        for number, size in enumerate(view.shape)
    )
    pairs = [p for amount in reversed(padding) for p in (amount, amount)]
    return lowering.store(padded(view, pairs, fill, shape))


def _convolution(lowering: Lowering, node: Node) -> Any:
    """conv1d, conv2d, conv3d: x [N, C, ...], weight [O, C / groups, ...]."""
    x, weight, bias, stride, padding, dilation, groups = (*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
    kernel_view = lowering.contiguous(weight)
    spatial = len(kernel_view.shape) - 2
    if isinstance(padding, str):
        raise CompileError(f"{node.name} pads by the word {padding!r}; give numbers")
    strides, pads, dilations = (_list(v, spatial) for v in (stride, padding, dilation))
    source = _padded(lowering, x, pads, 0.0)
    shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]
    outputs_per_group = int(kernel_view.shape[0]) // int(groups)  # type: ignore[arg-type, call-overload]
    channels = int(kernel_view.shape[1])

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        channel, *taps = reduced
        batch, output = index.axis(0), index.axis(1)
        at = [index.axis(2 + n) * strides[n] + tap * dilations[n] for n, tap in enumerate(taps)]
        first = tirx.truncdiv(output, tirx.const(outputs_per_group, "int64")) * channels if groups != 1 else 0
        left = kernel.load(source, Index(source.shape, kernel.sizes, axes=(batch, channel + first, *at)))
        right = kernel.load(kernel_view, Index(kernel_view.shape, kernel.sizes, axes=(output, channel, *taps)))
        return left * right

    depth = kernel_view.shape[1:]
    stored = reduce_generic(lowering, f"conv{spatial}d", shape, dtype, depth, (source, kernel_view), element, "sum")
    if bias is None:
        return stored
    added = lowering.contiguous(bias)
    return Lazy(
        shape,
        dtype,
        (stored, added),
        lambda kernel, index: kernel.load(stored, index) + kernel.flat(added.storage)[index.axis(1)],
    )


def _window(
    lowering: Lowering,
    node: Node,
    source: View,
    window: list[int],
    strides: list[int],
    dilations: list[int],
    combine: str,
    finish: Callable[[Kernel, Any], Any],
    name: str,
) -> View:
    shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]
    leading = len(shape) - len(window)

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        at = [index.axis(n) for n in range(leading)]
        at += [index.axis(leading + n) * strides[n] + tap * dilations[n] for n, tap in enumerate(reduced)]
        return kernel.load(source, Index(source.shape, kernel.sizes, axes=tuple(at)))

    return reduce_generic(lowering, name, shape, dtype, tuple(window), (source,), element, combine, finish)


def _max_pool(lowering: Lowering, node: Node) -> View:
    """max_pool2d (x, window, stride, padding, dilation, ceil_mode)."""
    x, window, stride, padding, dilation, ceil_mode = (*node.args, *(None, [], 0, 1, False)[len(node.args) - 1 :])
    if ceil_mode:
        raise CompileError(f"{node.name} pools in ceil mode, which has no lowering yet")
    size = _list(window, 2)
    source = _padded(lowering, x, _list(padding, 2), float("-inf"))
    strides = _list(stride, 2) if stride else size
    return _window(lowering, node, source, size, strides, _list(dilation, 2), "max", lambda _, t: t, "max_pool")


def _average_pool(lowering: Lowering, node: Node) -> View:
    """avg_pool2d (x, window, stride, padding, ceil_mode, count_include_pad, divisor)."""
    defaults = (None, [], 0, False, True, None)
    x, window, stride, padding, ceil_mode, include, divisor = (*node.args, *defaults[len(node.args) - 1 :])
    size, pads = _list(window, 2), _list(padding, 2)
    if ceil_mode or (any(pads) and not include):
        raise CompileError(
            f"{node.name} pools in ceil mode or leaves padding out of the count, which has no lowering yet"
        )
    source = _padded(lowering, x, pads, 0.0)
    strides = _list(stride, 2) if stride else size
    count = float(divisor or size[0] * size[1])  # type: ignore[arg-type]

    def finish(kernel: Kernel, total: Any) -> Any:
        return total * tirx.const(1 / count, str(total.ty.dtype))

    return _window(lowering, node, source, size, strides, [1, 1], "sum", finish, "average_pool")


def _adaptive_average_pool(lowering: Lowering, node: Node) -> View:
    """Output sizes that divide the input's: equal windows."""
    source = lowering.contiguous(node.args[0])
    shape = shape_of(node.meta["val"])
    spatial: list[Size] = list(source.shape[-2:])
    outputs = list(shape[-2:])
    if any(
        not isinstance(o, int) or (o != 1 and (not isinstance(s, int) or s % o))
        for s, o in zip(spatial, outputs, strict=True)
    ):
        raise CompileError(
            f"{node.name} pools {tuple(spatial)} to {tuple(outputs)}: windows of unequal size have no lowering yet"
        )
    window = [s if o == 1 else s // o for s, o in zip(spatial, outputs, strict=True)]

    def finish(kernel: Kernel, total: Any) -> Any:
        return total / kernel.size(product(window)).astype(str(total.ty.dtype))

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        at = [index.axis(n) for n in range(len(shape) - 2)]
        at += [index.axis(len(shape) - 2 + n) * kernel.size(window[n]) + tap for n, tap in enumerate(reduced)]
        return kernel.load(source, Index(source.shape, kernel.sizes, axes=tuple(at)))

    dtype = DTYPES[node.meta["val"].dtype]
    return reduce_generic(lowering, "adaptive_pool", shape, dtype, tuple(window), (source,), element, "sum", finish)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool,
}
