"""Reductions: over trailing axes by the row rule, over others with the kept columns in vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, constant, convert, dtype_of, is_float, like
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules import rows
from graphopt.backends.rules.generic import reduce_generic, scan_generic
from graphopt.backends.sizes import Shape, Size, product, shape_of
from graphopt.backends.values import Index, Lazy, View, whole
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
COLUMNS_RULE = "column-reduction"
Finish = Callable[["Kernel", Any], Any]


def axes_of(argument: Any, rank: int) -> list[int]:
    """The axes meant by an argument that is an axis, a list of them or nothing, which means all."""
    if argument is None or argument == [] or rank == 0:
        return list(range(rank))
    return sorted({int(axis) % rank for axis in ([argument] if isinstance(argument, int) else argument)})


def _unchanged(kernel: Kernel, total: Any) -> Any:
    return total


def reduce(
    lowering: Lowering, value: Any, axes: list[int], dtype: str, combine: str, finish: Finish = _unchanged
) -> View:
    """Reduce `axes` of `value`, computing in `dtype`; the result keeps them with size 1."""
    rank = len(value.shape)
    kept = [axis for axis in range(rank) if axis not in axes]
    depth = tuple(value.shape[axis] for axis in axes)
    shape = tuple(value.shape[axis] for axis in kept)
    if axes and kept == list(range(len(kept))) and value.dtype == dtype == "float32":
        merged = lowering.contiguous(reshape(lowering, value, (*shape, product(depth))))
        (stored,) = lowering.call(rows.reduce_last(merged, shape, combine, lowering.target, finish, combine))
    else:
        source = value

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            where = dict(zip(axes, reduced, strict=True)) | {axis: index.axis(n) for n, axis in enumerate(kept)}
            at = Index(value.shape, kernel.sizes, axes=tuple(where[axis] for axis in range(rank)))
            return convert(kernel.load(source, at), dtype)

        rule = COLUMNS_RULE if rank - 1 in kept else "generic"
        stored = reduce_generic(lowering, combine, shape, dtype, depth, (source,), element, combine, finish, rule)
    return whole(stored.storage, tuple(1 if axis in axes else size for axis, size in enumerate(value.shape)))


def _as_node(node: Node, result: View) -> View:
    """The result in the node's shape, with or without the reduced axes."""
    return whole(result.storage, shape_of(node.meta["val"]))


def _prepared(lowering: Lowering, node: Node) -> tuple[Any, list[int], str]:
    """Operand, axes and dtype of a reduction whose arguments are called self and dim."""
    given = arguments(node)
    value = lowering.tensor(given["self"])
    meta = node.meta["val"]
    dtype = DTYPES[(meta[0] if isinstance(meta, (tuple, list)) else meta).dtype]
    return value, axes_of(given.get("dim"), len(value.shape)), dtype


def _mean_of(value: Any, axes: list[int]) -> Finish:
    count = product(value.shape[axis] for axis in axes)
    return lambda kernel, total: _over(kernel, total, count, 0)


def _over(kernel: Kernel, total: Any, count: Size, correction: float) -> Any:
    """total / max(count - correction, 0); TVM refuses to divide by a constant 0."""
    if isinstance(count, int):
        divisor = max(count - correction, 0)
        return total / like(total, divisor) if divisor else total * like(total, math.inf)
    left = kernel.size(count).astype(dtype_of(total)) - like(total, correction)
    return total / tirx.Select(left < like(left, 0), like(left, 0), left)


def _simple(combine: str) -> Callable[[Lowering, Node], View]:
    def lower(lowering: Lowering, node: Node) -> View:
        value, axes, dtype = _prepared(lowering, node)
        return _as_node(node, reduce(lowering, value, axes, dtype, combine))

    return lower


def _mean(lowering: Lowering, node: Node) -> View:
    value, axes, dtype = _prepared(lowering, node)
    return _as_node(node, reduce(lowering, value, axes, dtype, "sum", _mean_of(value, axes)))


def _extreme_and_position(combine: str) -> Callable[[Lowering, Node], tuple[View, View]]:
    """max and min along one axis: values and the positions of the first of them."""

    def lower(lowering: Lowering, node: Node) -> tuple[View, View]:
        value, axes, dtype = _prepared(lowering, node)
        value = lowering.view(value)
        best = reduce(lowering, value, axes, dtype, combine)
        positions = _first_position(lowering, value, best, axes)
        shape = shape_of(node.meta["val"][0])
        return whole(best.storage, shape), whole(positions.storage, shape)

    return lower


def _arg_extreme(combine: str) -> Callable[[Lowering, Node], View]:
    def lower(lowering: Lowering, node: Node) -> View:
        given = arguments(node)
        value: Any = lowering.view(given["self"])
        if given["dim"] is None:
            value = reshape(lowering, value, (product(value.shape),))
        axes = axes_of(-1 if given["dim"] is None else given["dim"], len(value.shape))
        best = reduce(lowering, value, axes, value.dtype, combine)
        return _as_node(node, _first_position(lowering, value, best, axes))

    return lower


def _first_position(lowering: Lowering, value: Any, best: View, axes: list[int]) -> View:
    """Along the only axis in `axes`, the first position that holds `best`, NaN included."""

    def element(kernel: Kernel, index: Index) -> Any:
        here, wanted = (convert(kernel.load(v, index), computed_in(value.dtype)) for v in (value, best))
        found = tirx.EQ(here, wanted)
        if is_float(dtype_of(here)):
            found = tirx.any(found, approximations.is_nan(here))
        position = index.axis(axes[0]) if axes else constant(0, "int64")
        return tirx.Select(found, position, tirx.max_value("int64"))

    positions = Lazy(value.shape, "int64", (value, best), element)
    return reduce(lowering, positions, axes, "int64", "min")


def _norm(lowering: Lowering, node: Node) -> View:
    """The Euclidean norm, the sum and the largest of absolute values."""
    order = arguments(node)["ord"]
    value, axes, dtype = _prepared(lowering, node)
    forms: dict[Any, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
        1: (tirx.abs, "sum", lambda total: total),
        2: (lambda x: x * x, "sum", tirx.sqrt),
        math.inf: (tirx.abs, "max", lambda total: total),
    }
    if order not in forms:
        raise CompileError(f"{node.name} takes the norm of order {order}; orders 1, 2 and inf have a lowering")
    term, combine, last = forms[order]

    def element(kernel: Kernel, index: Index) -> Any:
        return term(convert(kernel.load(value, index), computed_in(dtype)))

    terms = Lazy(value.shape, computed_in(dtype), (value,), element, flat=True)
    return _as_node(node, reduce(lowering, terms, axes, dtype, combine, lambda _, total: last(total)))


def _spread(lowering: Lowering, node: Node, root: bool) -> tuple[View, View]:
    """Variance or its root, and the mean; in two passes, so that large values do not cancel."""
    value, axes, dtype = _prepared(lowering, node)
    given = arguments(node)
    correction = given["correction"] if "correction" in given else int(given["unbiased"])
    correction = 1 if correction is None else correction
    stored = lowering.view(value)
    mean = reduce(lowering, stored, axes, dtype, "sum", _mean_of(stored, axes))

    def element(kernel: Kernel, index: Index) -> Any:
        distance = kernel.load(stored, index) - kernel.load(mean, index)
        return distance * distance

    def finish(kernel: Kernel, total: Any) -> Any:
        result = _over(kernel, total, product(stored.shape[axis] for axis in axes), correction)
        return tirx.sqrt(result) if root else result

    squares = Lazy(stored.shape, stored.dtype, (stored, mean), element)
    return reduce(lowering, squares, axes, dtype, "sum", finish), mean


def _variance(root: bool) -> Callable[[Lowering, Node], View]:
    return lambda lowering, node: _as_node(node, _spread(lowering, node, root)[0])


def _variance_and_mean(lowering: Lowering, node: Node) -> tuple[View, View]:
    variance, mean = _spread(lowering, node, root=False)
    shape = shape_of(node.meta["val"][0])
    return whole(variance.storage, shape), whole(mean.storage, shape)


def _log_sum_exp(lowering: Lowering, node: Node) -> Lazy:
    """log(sum(e^x)) with the largest x taken out; infinite ones stay, since inf - inf is NaN."""
    value, axes, dtype = _prepared(lowering, node)
    if dtype != "float32":
        raise CompileError(f"{node.name} works on {dtype}; {node.target} is lowered for float32 only so far")
    stored = lowering.view(value)
    top = reduce(lowering, stored, axes, dtype, "max")

    def shift(kernel: Kernel, index: Index) -> Any:
        largest = kernel.load(top, index)
        return tirx.Select(tirx.EQ(tirx.abs(largest), like(largest, math.inf)), like(largest, 0), largest)

    def element(kernel: Kernel, index: Index) -> Any:
        return approximations.exp(kernel.load(stored, index) - shift(kernel, index))

    total = reduce(lowering, Lazy(stored.shape, dtype, (stored, top), element), axes, dtype, "sum")
    shape: Shape = shape_of(node.meta["val"])
    total, top = whole(total.storage, shape), whole(top.storage, shape)

    def logarithm(kernel: Kernel, index: Index) -> Any:
        return tirx.log(kernel.load(total, index)) + shift(kernel, index)

    return Lazy(shape, dtype, (total, top), logarithm, flat=True)


def _logical(combine: str) -> Callable[[Lowering, Node], Any]:
    """any is the maximum and all the minimum of the truth values."""

    def lower(lowering: Lowering, node: Node) -> Any:
        value, axes, dtype = _prepared(lowering, node)

        def element(kernel: Kernel, index: Index) -> Any:
            return convert(convert(kernel.load(value, index), "bool"), "uint8")

        truth = Lazy(value.shape, "uint8", (value,), element, flat=True)
        flag = _as_node(node, reduce(lowering, truth, axes, "uint8", combine))
        return Lazy(
            flag.shape, dtype, (flag,), lambda kernel, index: convert(kernel.load(flag, index), dtype), flat=True
        )

    return lower


def _running_sum(lowering: Lowering, node: Node) -> View:
    given = arguments(node)
    source = lowering.view(given["self"])
    if not source.shape:
        return source
    return scan_generic(
        lowering, "cumsum", source, int(given["dim"]) % len(source.shape), DTYPES[node.meta["val"].dtype]
    )


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
    aten.max.dim: _extreme_and_position("max"),
    aten.min.dim: _extreme_and_position("min"),
    aten.argmax.default: _arg_extreme("max"),
    aten.argmin.default: _arg_extreme("min"),
    aten.prod.default: _simple("product"),
    aten.prod.dim_int: _simple("product"),
    aten.linalg_vector_norm.default: _norm,
    aten.logsumexp.default: _log_sum_exp,
    **{getattr(aten.var, name): _variance(root=False) for name in ("default", "dim", "correction")},
    **{getattr(aten.std, name): _variance(root=True) for name in ("default", "dim", "correction")},
    **{getattr(aten.var_mean, name): _variance_and_mean for name in ("default", "dim", "correction")},
    aten.any.default: _logical("max"),
    aten.any.dim: _logical("max"),
    aten.any.dims: _logical("max"),
    aten.all.default: _logical("min"),
    aten.all.dim: _logical("min"),
    aten.all.dims: _logical("min"),
}
