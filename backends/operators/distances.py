"""Distances between rows: p-norms of differences, of every row of one tensor to every row of another or of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, like, not_equal
from graphopt.backends.operators.pointwise import whole_power
from graphopt.backends.operators.views import expand
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Rows = Callable[["Kernel", Index, Any], tuple[Any, Any]]


def _norm(lowering: Lowering, node: Node, reads: tuple[View, ...], rows: Rows, order: float) -> View:
    """(sum over columns of |a - b|^order)^(1 / order); the limits at 0 and infinity are a count and a maximum."""
    meta = node.meta["val"]
    dtype = DTYPES[meta.dtype]

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        a, b = (convert(value, computed_in(dtype)) for value in rows(kernel, index, reduced[0]))
        distance = tirx.abs(a - b)
        if order == 0:
            return tirx.Select(not_equal(distance, like(distance, 0)), like(distance, 1), like(distance, 0))
        if order in (1, math.inf):
            return distance
        return whole_power(distance, int(order)) if order in range(17) else tirx.power(distance, like(distance, order))

    def finish(_: Kernel, total: Any) -> Any:
        if order in (0, 1, math.inf):
            return tirx.max(total, like(total, 0)) if order == math.inf and reads[0].shape[-1] == 0 else total
        return tirx.sqrt(total) if order == 2 else tirx.power(total, like(total, 1 / order))

    combine, depth = "max" if order == math.inf else "sum", reads[0].shape[-1:]
    return reduce_generic(lowering, "distances", shape_of(meta), dtype, depth, reads, element, combine, finish)


def _between(lowering: Lowering, node: Node) -> View:
    """cdist: x [..., P, M] and y [..., R, M] to [..., P, R]."""
    x, y, order, _ = arguments(node).values()
    batch = shape_of(node.meta["val"])[:-2]
    first, second = (lowering.view(value) for value in (x, y))
    first, second = (expand(lowering, value, (*batch, *value.shape[-2:])) for value in (first, second))

    def rows(kernel: Kernel, index: Index, column: Any) -> tuple[Any, Any]:
        lead = [index.axis(number) for number in range(len(batch))]
        places = index.axis(len(batch)), index.axis(len(batch) + 1)
        return tuple(
            kernel.load(value, Index(value.shape, kernel.sizes, axes=(*lead, place, column)))
            for value, place in zip((first, second), places, strict=True)
        )

    return _norm(lowering, node, (first, second), rows, float(order))


def _within(lowering: Lowering, node: Node) -> View:
    """pdist: x [N, M] to [N (N - 1) / 2], the pairs i < j one row i after the other."""
    argument, order = arguments(node).values()
    x = lowering.view(argument)

    def rows(kernel: Kernel, index: Index, column: Any) -> tuple[Any, Any]:
        count, pair = kernel.size(x.shape[0]), index.axis(0)
        middle = count.astype("float64") - tirx.const(0.5, "float64")
        root = tirx.sqrt(middle * middle - (pair * 2 + 1).astype("float64"))
        first = (middle - root).astype("int64")
        second = pair - count * first + tirx.truncdiv(first * (first + 1), tirx.const(2, "int64")) + first + 1
        return tuple(kernel.load(x, Index(x.shape, kernel.sizes, axes=(place, column))) for place in (first, second))

    return _norm(lowering, node, (x,), rows, float(order))


TABLE: dict[Any, Callable[..., Any]] = {
    aten._cdist_forward.default: _between,
    aten.cdist.default: _between,
    aten._pdist_forward.default: _within,
    aten.pdist.default: _within,
}
