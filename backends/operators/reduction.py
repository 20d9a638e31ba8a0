"""Reductions over any axes, in the order in which the operand lies in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import (
    cast,
    computed_in,
    constant,
    convert,
    dtype_of,
    is_float,
    like,
    not_equal,
)
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules import reduction as rule
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.rules.rows import reduced_rows
from graphopt.backends.rules.scan import running
from graphopt.backends.sizes import Shape, Size, contiguous_strides, product, shape_of
from graphopt.backends.values import (
    Index,
    Lazy,
    Product,
    View,
    inverse,
    memory_order,
    permutation,
    permuted,
    preferred_order,
    reads_flat,
    whole,
)
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Finish = Callable[["Kernel", Any], Any]
EXPANSIONS = frozenset({aten.expand.default, aten.expand_as.default})


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
    if dtype == "bool":  # LLVM cannot order flags
        whole_numbers = reduce(lowering, cast(value, "uint8"), axes, "uint8", combine, finish)
        return lowering.store(cast(whole_numbers, "bool"))
    if 0 in value.shape:
        return _of_nothing(lowering, value.shape, axes, dtype, combine, finish)
    source, kept, parts = _innermost_last(lowering, value, axes)
    if pieces := rule.pieces_for(source, parts, lowering.target):
        partial = rule.reduced(source, parts, dtype, combine, finish, lowering.target, pieces=pieces)
        source, parts = lowering.call(partial)[0], [0]
    (stored,) = lowering.call(
        rule.reduced(source, parts, dtype, combine, finish, lowering.target, sizes=tuple(value.shape))
    )
    found = dict(zip(kept, contiguous_strides(tuple(value.shape[axis] for axis in kept)), strict=True))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    return View(stored.storage, shape, tuple(found.get(axis, 1) for axis in range(len(shape))))


def _of_nothing(lowering: Lowering, shape: Shape, axes: list[int], dtype: str, combine: str, finish: Finish) -> View:
    """What a reduction starts from, finished: 0 for a sum, NaN for a mean."""
    result = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    zero = constant(0, dtype)
    return reduce_generic(
        lowering, combine, result, dtype, (0,), (), lambda *_: zero, combine, finish, rule.COLUMNS_RULE
    )


def _innermost_last(lowering: Lowering, value: Any, axes: list[int]) -> tuple[Any, list[int], list[int]]:
    """The value with its axes as they lie in memory, neighbours of one kind as one: (value, kept axes, reduced parts).

    Kept axes are those of `value`, in the order in which they lie; reduced parts are axes of the new value.
    """
    order = memory_order(value) if isinstance(value, View) else preferred_order(value)
    if isinstance(value, View):
        order = tuple(range(len(value.shape))) if 0 in value.strides else order
        order = tuple(axis for axis in order if value.shape[axis] != 1)
    kept = [axis for axis in order if axis not in axes]
    groups: list[list[int]] = []
    for place, axis in enumerate(order):
        same = bool(groups) and (order[place - 1] in axes) == (axis in axes)
        groups = [*groups[:-1], [*groups[-1], axis]] if same else [*groups, [axis]]
    source = _merged(lowering, value, groups)
    if source is None:
        source = permuted(value, order) if isinstance(value, View) else permutation(value, order)
        groups = [[axis] for axis in order]
    return source, kept, [place for place, group in enumerate(groups) if group[0] in axes]


def _merged(lowering: Lowering, value: Any, groups: list[list[int]]) -> View | Lazy | None:
    """One axis for each group, where elements of a group lie one after the other."""
    shape = tuple(product(value.shape[axis] for axis in group) for group in groups)
    order = [axis for group in groups for axis in group]
    if isinstance(value, Lazy):
        flat = order == list(range(len(order))) and reads_flat(value, value.shape)
        return reshape(lowering, value, shape) if flat else None
    if any(
        value.strides[axis] != value.strides[after] * value.shape[after]
        for group in groups
        for axis, after in pairwise(group)
    ):
        return None
    return View(value.storage, shape, tuple(value.strides[group[-1]] for group in groups), value.offset)


def _without(result: View, axes: list[int], shape: Shape) -> View:
    """The result as `shape`, which may lack the reduced axes."""
    kept = [axis for axis in range(len(result.shape)) if len(shape) == len(result.shape) or axis not in axes]
    return View(result.storage, shape, tuple(result.strides[axis] for axis in kept))


def as_node(node: Node, result: View, axes: list[int]) -> View:
    return _without(result, axes, shape_of(node.meta["val"]))


def _reduced(
    lowering: Lowering,
    node: Node,
    value: Any,
    axes: list[int],
    dtype: str,
    combine: str,
    finish: Finish = _unchanged,
) -> View:
    """The node's reduction; where all that reads it leads to whole rows again, one kernel reduces and writes these."""
    together = lowering.row_epilogue(node, value.shape) if _by_rows(lowering, value, axes, dtype) else []
    if not together:
        return as_node(node, reduce(lowering, value, axes, dtype, combine, finish), axes)
    result = Product(shape_of(node.meta["val"]), dtype)
    lowering.env[node] = end = result
    steps: list[tuple[Product, Lazy]] = []
    for follower in together:
        if follower.target in EXPANSIONS:  # readers broadcast
            lowering.env[follower] = lowering.env[follower.all_input_nodes[0]]
            continue
        end = lowering.follow(follower, together)
        if end.shape != value.shape and isinstance(end, Lazy):
            lowering.env[follower] = number = Product(end.shape, end.dtype)
            steps.append((number, end))
    code = reduced_rows(value, combine, finish, result, steps, end, lowering.target)
    return lowering.conclude(node, together, code)


def _by_rows(lowering: Lowering, value: Any, axes: list[int], dtype: str) -> bool:
    """Whether it reduces rows as they lie in memory, enough of them to share out, in float32."""
    last = len(value.shape) - 1
    if axes != [last] or last < 0 or 0 in value.shape or rule.accumulated_in(dtype) != "float32":
        return False
    order = memory_order(value) if isinstance(value, View) else preferred_order(value)
    return order == tuple(range(last + 1)) and not rule.pieces_for(value, axes, lowering.target)


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
        return _reduced(lowering, node, *_prepared(lowering, node), combine)

    return lower


def _mean(lowering: Lowering, node: Node) -> View:
    value, axes, dtype = _prepared(lowering, node)
    return _reduced(lowering, node, value, axes, dtype, "sum", _mean_of(value, axes))


def mean(lowering: Lowering, value: Any, axes: list[int], shape: Shape) -> View:
    """The mean over `axes` as a tensor of `shape`, which has them with size 1 or not at all."""
    return _without(reduce(lowering, value, axes, value.dtype, "sum", _mean_of(value, axes)), axes, shape)


def _extreme_and_position(combine: str) -> Callable[[Lowering, Node], tuple[View, View]]:
    """max and min along one axis: values and the positions of the first of them."""

    def lower(lowering: Lowering, node: Node) -> tuple[View, View]:
        value, axes, dtype = _prepared(lowering, node)
        value = lowering.view(value)
        best = reduce(lowering, value, axes, dtype, combine)
        positions = _first_position(lowering, value, best, axes)
        shape = shape_of(node.meta["val"][0])
        return _without(best, axes, shape), _without(positions, axes, shape)

    return lower


def _arg_extreme(combine: str) -> Callable[[Lowering, Node], View]:
    def lower(lowering: Lowering, node: Node) -> View:
        given = arguments(node)
        value: Any = lowering.view(given["self"])
        if given["dim"] is None:
            value = reshape(lowering, value, (product(value.shape),))
        axes = axes_of(-1 if given["dim"] is None else given["dim"], len(value.shape))
        best = reduce(lowering, value, axes, value.dtype, combine)
        positions = _first_position(lowering, value, best, axes)
        return (
            as_node(node, positions, axes)
            if given["dim"] is not None
            else whole(positions.storage, shape_of(node.meta["val"]))
        )

    return lower


def _first_position(lowering: Lowering, value: Any, best: View, axes: list[int]) -> View:
    """Along the only axis in `axes`, the first position that holds `best`, NaN included."""

    def element(kernel: Kernel, index: Index) -> Any:
        here, wanted = (convert(kernel.load(v, index), computed_in(value.dtype)) for v in (value, best))
        found = tirx.Not(not_equal(here, wanted)) if value.dtype == "bool" else tirx.EQ(here, wanted)
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
    return _reduced(lowering, node, terms, axes, dtype, combine, lambda _, total: last(total))


def _spread(lowering: Lowering, node: Node, root: bool) -> tuple[View, View]:
    """Variance or its root, and the mean; in two passes, so that large values do not cancel."""
    meta = node.meta["val"]
    shape = shape_of(meta[0] if isinstance(meta, (tuple, list)) else meta)
    value, axes, dtype = _prepared(lowering, node)
    given = arguments(node)
    correction = given["correction"] if "correction" in given else int(given["unbiased"])
    correction = 1 if correction is None else correction
    last: Callable[[Any], Any] = tirx.sqrt if root else lambda variance: variance
    spread, center = moments(lowering, value, axes, dtype, correction, last)
    return _without(spread, axes, shape), _without(center, axes, shape)


def moments(
    lowering: Lowering, value: Any, axes: list[int], dtype: str, correction: float, last: Callable[[Any], Any]
) -> tuple[View, View]:
    """last(variance) and the mean over `axes`, which the results keep with size 1."""
    stored = lowering.view(value)
    center = reduce(lowering, stored, axes, dtype, "sum", _mean_of(stored, axes))

    def element(kernel: Kernel, index: Index) -> Any:
        distance = kernel.load(stored, index) - kernel.load(center, index)
        return distance * distance

    def finish(kernel: Kernel, total: Any) -> Any:
        return last(_over(kernel, total, product(stored.shape[axis] for axis in axes), correction))

    squares = Lazy(stored.shape, stored.dtype, (stored, center), element)
    return reduce(lowering, squares, axes, dtype, "sum", finish), center


def _variance(root: bool) -> Callable[[Lowering, Node], View]:
    return lambda lowering, node: _spread(lowering, node, root)[0]


def _variance_and_mean(lowering: Lowering, node: Node) -> tuple[View, View]:
    return _spread(lowering, node, root=False)


def _log_sum_exp(lowering: Lowering, node: Node) -> Lazy:
    value, axes, dtype = _prepared(lowering, node)
    shape: Shape = shape_of(node.meta["val"])
    total, top = (_without(each, axes, shape) for each in exponentials(lowering, value, axes))
    end = Lazy(shape, total.dtype, (total, top), lambda k, i: tirx.log(k.load(total, i)) + finite(k, top, i), flat=True)
    return cast(end, dtype)


def exponentials(lowering: Lowering, value: Any, axes: list[int]) -> tuple[View, View]:
    """The sum of e^(x - largest x) over `axes`, which it keeps with size 1, and the largest x.

    An infinite largest one stays where it is, since inf - inf is NaN.
    """
    stored = lowering.view(cast(value, computed_in(value.dtype)))
    top = reduce(lowering, stored, axes, stored.dtype, "max")

    def element(kernel: Kernel, index: Index) -> Any:
        return exponential(kernel.load(stored, index) - finite(kernel, top, index))

    terms = Lazy(stored.shape, stored.dtype, (stored, top), element)
    return reduce(lowering, terms, axes, stored.dtype, "sum"), top


def finite(kernel: Kernel, value: View, index: Index) -> Any:
    """An element, 0 in place of infinities."""
    x = kernel.load(value, index)
    return tirx.Select(tirx.EQ(tirx.abs(x), like(x, math.inf)), like(x, 0), x)


def exponential(x: Any) -> Any:
    return approximations.exp(x) if dtype_of(x) == "float32" else tirx.exp(x)


def _logical(combine: str) -> Callable[[Lowering, Node], Any]:
    """any is the maximum and all the minimum of the truth values."""

    def lower(lowering: Lowering, node: Node) -> Any:
        value, axes, dtype = _prepared(lowering, node)

        def element(kernel: Kernel, index: Index) -> Any:
            return convert(convert(kernel.load(value, index), "bool"), "uint8")

        truth = Lazy(value.shape, "uint8", (value,), element, flat=True)
        flag = as_node(node, reduce(lowering, truth, axes, "uint8", combine), axes)
        return Lazy(
            flag.shape, dtype, (flag,), lambda kernel, index: convert(kernel.load(flag, index), dtype), flat=True
        )

    return lower


def _running(lowering: Lowering, node: Node) -> Any:
    given = arguments(node)
    source = lowering.view(given["self"])
    if not source.shape:
        return cast(source, DTYPES[node.meta["val"].dtype])
    order = tuple(range(len(source.shape))) if 0 in source.strides else memory_order(source)
    axis = order.index(int(given["dim"]) % len(order))
    products = node.target is aten.cumprod.default
    code = running(permuted(source, order), axis, DTYPES[node.meta["val"].dtype], lowering.target, products=products)
    return permuted(lowering.call(code)[0], inverse(order))


TABLE: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: _running,
    aten.cumprod.default: _running,
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
