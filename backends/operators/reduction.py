"""Reductions: along the last axis by the row rule, along others with the kept columns in vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.element_wise import convert
from graphopt.backends.rules import rows
from graphopt.backends.rules.generic import reduce_generic, scan_generic
from graphopt.backends.sizes import Shape, product, shape_of
from graphopt.backends.values import Index, Lazy, Value, whole
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
COLUMNS_RULE = "column-reduction"
Finish = Callable[["Kernel", Any], Any]


def _axes(argument: Any, rank: int) -> list[int]:
    if argument is None or argument == []:
        return list(range(rank))
    return sorted({int(axis) % rank for axis in ([argument] if isinstance(argument, int) else argument)})


def reduce(
    lowering: Lowering,
    node: Node,
    value: Value,
    axes: list[int],
    combine: str,
    finish: Finish = lambda kernel, total: total,
) -> Any:
    """Reduce `axes` of `value`; the result has the node's shape, with or without the reduced axes."""
    shape, rank = shape_of(node.meta["val"]), len(value.shape)
    dtype = DTYPES[node.meta["val"].dtype]
    name = combine
    if axes == [rank - 1] and value.dtype == dtype == "float32":
        view = lowering.contiguous(value)
        (stored,) = lowering.call(rows.reduce_last(view, shape, combine, lowering.target, finish, name))
        return stored
    kept = [axis for axis in range(rank) if axis not in axes]
    result = tuple(value.shape[axis] for axis in kept)
    source = lowering.view(value) if isinstance(value, Lazy) and value.shared else value

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        where: list[Any] = [None] * rank
        for number, axis in enumerate(kept):
            where[axis] = index.axis(number)
        for axis, position in zip(axes, reduced, strict=True):
            where[axis] = position
        return convert(kernel.load(source, Index(value.shape, kernel.sizes, axes=tuple(where))), dtype)

    rule = COLUMNS_RULE if rank - 1 in kept else "generic"
    depth = tuple(value.shape[axis] for axis in axes)
    stored = reduce_generic(lowering, name, result, dtype, depth, (source,), element, combine, finish, rule)
    return whole(stored.storage, shape)


def _mean_of(sizes: Shape, dtype: str) -> Finish:
    return lambda kernel, total: (
        total / kernel.size(product(sizes)).astype("float32" if dtype in ("float16", "bfloat16") else dtype)
    )


def _simple(combine: str) -> Callable[[Lowering, Node], Any]:
    def lower(lowering: Lowering, node: Node) -> Any:
        value = lowering.tensor(node.args[0])
        return reduce(
            lowering, node, value, _axes(node.args[1] if len(node.args) > 1 else None, len(value.shape)), combine
        )

    return lower


def _mean(lowering: Lowering, node: Node) -> Any:
    value = lowering.tensor(node.args[0])
    axes = _axes(node.args[1] if len(node.args) > 1 else None, len(value.shape))
    finish = _mean_of(tuple(value.shape[axis] for axis in axes), DTYPES[node.meta["val"].dtype])
    return reduce(lowering, node, value, axes, "sum", finish)


def _norm(lowering: Lowering, node: Node) -> Any:
    """linalg_vector_norm (x, order, axes): the Euclidean norm, the sum and the largest of absolute values."""
    order = node.args[1] if len(node.args) > 1 else 2
    value = lowering.tensor(node.args[0])
    axes = _axes(node.args[2] if len(node.args) > 2 else None, len(value.shape))
    forms: dict[Any, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
        1: (tirx.abs, "sum", lambda total: total),
        2: (lambda x: x * x, "sum", tirx.sqrt),
        math.inf: (tirx.abs, "max", lambda total: total),
    }
    if order not in forms:
        raise CompileError(f"{node.name} takes the norm of order {order}; orders 1, 2 and inf have a lowering")
    term, combine, last = forms[order]

    def element(kernel: Kernel, index: Index) -> Any:
        return term(kernel.load(value, index))

    terms = Lazy(value.shape, value.dtype, (value,), element, flat=True)
    return reduce(lowering, node, terms, axes, combine, lambda kernel, total: last(total))


def _variance(root: bool) -> Callable[[Lowering, Node], Any]:
    """Two passes: the mean first, so that large values do not cancel."""

    def lower(lowering: Lowering, node: Node) -> Any:
        value = lowering.tensor(node.args[0])
        axes = _axes(node.args[1] if len(node.args) > 1 else None, len(value.shape))
        correction = node.kwargs.get("correction", 1)
        correction = 1 if correction is None else correction
        sizes = tuple(value.shape[axis] for axis in axes)
        stored = lowering.view(value)
        mean = _kept_mean(lowering, node, stored, axes)

        def element(kernel: Kernel, index: Index) -> Any:
            distance = kernel.load(stored, index) - kernel.load(mean, index)
            return distance * distance

        squares = Lazy(stored.shape, stored.dtype, (stored, mean), element)

        def finish(kernel: Kernel, total: Any) -> Any:
            count = (kernel.size(product(sizes)) - int(correction)).astype(stored.dtype)
            return tirx.sqrt(total / count) if root else total / count

        return reduce(lowering, node, squares, axes, "sum", finish)

    return lower


def _kept_mean(lowering: Lowering, node: Node, value: Any, axes: list[int]) -> Any:
    """The mean with reduced axes of size 1, whatever the node's own shape."""
    rank = len(value.shape)
    kept = [axis for axis in range(rank) if axis not in axes]
    sizes = tuple(value.shape[axis] for axis in axes)

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        where: list[Any] = [None] * rank
        for number, axis in enumerate(kept):
            where[axis] = index.axis(number)
        for axis, position in zip(axes, reduced, strict=True):
            where[axis] = position
        return kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(where)))

    shape = tuple(value.shape[axis] for axis in kept)
    stored = reduce_generic(
        lowering,
        "mean",
        shape,
        value.dtype,
        sizes,
        (value,),
        element,
        "sum",
        _mean_of(sizes, value.dtype),
        COLUMNS_RULE,
    )
    return whole(stored.storage, tuple(1 if axis in axes else size for axis, size in enumerate(value.shape)))


def _logical(combine: str) -> Callable[[Lowering, Node], Any]:
    """any is the maximum and all the minimum of the truth values."""

    def lower(lowering: Lowering, node: Node) -> Any:
        value = lowering.tensor(node.args[0])

        def element(kernel: Kernel, index: Index) -> Any:
            return convert(convert(kernel.load(value, index), "bool"), "uint8")

        truth = Lazy(value.shape, "uint8", (value,), element)
        axes = _axes(node.args[1] if len(node.args) > 1 else None, len(value.shape))
        rank = len(value.shape)
        kept = [axis for axis in range(rank) if axis not in axes]

        def each(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            where: list[Any] = [None] * rank
            for number, axis in enumerate(kept):
                where[axis] = index.axis(number)
            for axis, position in zip(axes, reduced, strict=True):
                where[axis] = position
            return kernel.load(truth, Index(value.shape, kernel.sizes, axes=tuple(where)))

        shape = tuple(value.shape[axis] for axis in kept)
        depth = tuple(value.shape[axis] for axis in axes)
        stored = reduce_generic(lowering, combine, shape, "uint8", depth, (truth,), each, combine)
        flag = whole(stored.storage, shape_of(node.meta["val"]))
        return Lazy(
            flag.shape, "bool", (flag,), lambda kernel, index: convert(kernel.load(flag, index), "bool"), flat=True
        )

    return lower


def _running_sum(lowering: Lowering, node: Node) -> Any:
    source = lowering.view(node.args[0])
    axis = int(node.args[1]) % len(source.shape)  # type: ignore[arg-type]
    return scan_generic(lowering, "cumsum", source, axis, DTYPES[node.meta["val"].dtype])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: _running_sum,
    aten.sum.default: _simple("sum"),
    aten.sum.dim_IntList: _simple("sum"),
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.amax.default: _simple("max"),
    aten.amin.default: _simple("min"),
    aten.max.default: _simple("max"),
    aten.min.default: _simple("min"),
    aten.prod.default: _simple("product"),
    aten.prod.dim_int: _simple("product"),
    aten.linalg_vector_norm.default: _norm,
    aten.var.correction: _variance(root=False),
    aten.std.correction: _variance(root=True),
    aten.any.default: _logical("max"),
    aten.any.dim: _logical("max"),
    aten.all.default: _logical("min"),
    aten.all.dim: _logical("min"),
}
