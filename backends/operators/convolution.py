"""Convolution through the generic kernel: correct for every shape, listed as slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of
from graphopt.backends.operators.views import reshape
from graphopt.backends.operators.windows import each_axis, load_at, quotient, surrounded
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[["Lowering", Node], Any]


def _padding(node: Node, argument: Any, taps: Sequence[int], dilations: Sequence[int]) -> tuple[list[int], list[int]]:
    """Elements before and after each spatial axis; "same" puts the odd one after."""
    if argument == "valid":
        return [0] * len(taps), [0] * len(taps)
    if argument == "same":
        totals = [d * (t - 1) for t, d in zip(taps, dilations, strict=True)]
        return [t // 2 for t in totals], [t - t // 2 for t in totals]
    each = each_axis(argument, len(taps))
    return each, each


def _convolution(spatial: int) -> Lower:
    """x [N, C, ...] or [C, ...], weight [O, C / groups, ...], bias [O] or none."""

    def lower(lowering: Lowering, node: Node) -> Any:
        x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
        filters = lowering.view(weight)
        strides, dilations = each_axis(stride, spatial), each_axis(dilation, spatial)
        before, after = _padding(node, padding, [int(s) for s in filters.shape[2:]], dilations)
        source = _batched(lowering, surrounded(lowering, x, before, after), spatial)
        meta = node.meta["val"]
        result, dtype = shape_of(meta), DTYPES[meta.dtype]
        shape = result if len(result) == spatial + 2 else (1, *result)
        outputs_each = int(filters.shape[0]) // int(groups)

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            channel, *taps = reduced
            batch, output = index.axis(0), index.axis(1)
            at = [index.axis(2 + n) * strides[n] + tap * dilations[n] for n, tap in enumerate(taps)]
            first = quotient(output, outputs_each) * int(filters.shape[1]) if groups != 1 else 0
            left = load_at(kernel, source, (batch, channel + first, *at))
            right = load_at(kernel, filters, (output, channel, *taps))
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
        strides, pads, dilations = (each_axis(v, spatial) for v in (stride, padding, dilation))
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
                    quotient(tirx.max(distance, int64(0)), strides[n]),
                    kernel.size(source.shape[2 + n]) - 1,
                )
                reached += [distance >= 0, tirx.EQ(position * strides[n], distance), position <= last]
                at.append(tirx.min(position, last))
            group = quotient(output, outputs_each)
            left = load_at(kernel, source, (index.axis(0), group * inputs_each + channel, *at))
            right = load_at(kernel, filters, (group * inputs_each + channel, output - group * outputs_each, *taps))
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


TABLE: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, f"conv{n}d").default: _convolution(n) for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: _convolution(n) for n in (1, 2, 3)},
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
}
