"""Windows of images as columns of a matrix, and the sum of such columns as an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, computed_in, convert, dtype_of
from graphopt.backends.operators.views import reshape
from graphopt.backends.operators.windows import each_axis, load_at, quotient, surrounded
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Size, shape_of
from graphopt.backends.values import Index, Lazy

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _count(size: Size, tap: int, dilation: int, pad: int, stride: int) -> Size:
    return (size + 2 * pad - dilation * (tap - 1) - 1) // stride + 1


def _to_columns(lowering: Lowering, node: Node) -> Any:
    """im2col: x [N, C, H, W] or [C, H, W] to [N, C kh kw, windows]."""
    x, *options = arguments(node).values()
    taps, dilations, pads, strides = (each_axis(option, 2) for option in options)
    source = surrounded(lowering, x, pads, pads)
    lead = len(source.shape) - 3
    extents = [size - 2 * pad for size, pad in zip(source.shape[-2:], pads, strict=True)]
    counts = tuple(_count(*each) for each in zip(extents, taps, dilations, pads, strides, strict=True))

    def element(kernel: Kernel, index: Index) -> Any:
        *batch, channel, row, column, first, second = (index.axis(number) for number in range(lead + 5))
        at = [
            window * stride + tap * dilation
            for window, tap, stride, dilation in zip((first, second), (row, column), strides, dilations, strict=True)
        ]
        return load_at(kernel, source, (*batch, channel, *at))

    shape = (*source.shape[:-2], *taps, *counts)
    return reshape(lowering, Lazy(shape, source.dtype, (source,), element), shape_of(node.meta["val"]))


def _to_image(lowering: Lowering, node: Node) -> Any:
    """col2im: x [N, C kh kw, windows] or [C kh kw, windows] to [N, C, H, W]; every pixel gathers what covers it."""
    x, _, *options = arguments(node).values()
    taps, dilations, pads, strides = (each_axis(option, 2) for option in options)
    meta = node.meta["val"]
    shape, dtype = shape_of(meta), "int32" if meta.dtype is torch.bool else DTYPES[meta.dtype]
    counts = tuple(_count(*each) for each in zip(shape[-2:], taps, dilations, pads, strides, strict=True))
    columns = lowering.contiguous(x)
    source = lowering.view(reshape(lowering, columns, (*shape[:-2], *taps, *counts)))
    lead = len(shape) - 2

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        at, reached = [], []
        for n, tap in enumerate(reduced):
            distance = index.axis(lead + n) + pads[n] - tap * dilations[n]
            window, last = quotient(tirx.max(distance, int64(0)), strides[n]), kernel.size(counts[n]) - 1
            reached += [distance >= 0, tirx.EQ(window * strides[n], distance), window <= last]
            at.append(tirx.min(window, last))
        outer = [index.axis(number) for number in range(lead)]
        value = convert(load_at(kernel, source, (*outer, *reduced, *at)), computed_in(dtype))
        return tirx.Select(tirx.all(*reached), value, tirx.const(0, dtype_of(value)))

    total = reduce_generic(lowering, "col2im", shape, dtype, tuple(taps), (source,), element, "sum")
    return cast(total, DTYPES[meta.dtype])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.im2col.default: _to_columns,
    aten.col2im.default: _to_image,
}
