"""Writing elements to places that a tensor of positions names: scatter, index_put, masked_scatter.

Negative positions count from the end, and what is still outside is written to the nearest place: no foreign memory is
ever touched. PyTorch raises there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, computed_in, constant, convert, dtype_of, is_float, like
from graphopt.backends.operators.indexing import element_at, inside
from graphopt.backends.operators.views import expand, reshape
from graphopt.backends.rules.scan import running
from graphopt.backends.rules.scatter import scatter
from graphopt.backends.sizes import Shape, Size, product, shape_of
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_COMBINE = {"sum": "sum", "add": "sum", "mean": "sum", "prod": "product", "multiply": "product", "amax": "max"}
_COMBINE["amin"] = "min"


def _constant(number: Any, dtype: str) -> Lazy:
    return Lazy((), dtype, (), lambda kernel, index: constant(number, dtype))


def _along(
    lowering: Lowering, base: Any, ids: View, source: Any, axis: int, combine: str, include_base: bool = True
) -> View:
    """base[..., ids[i, j, k], ...] and source[i, j, k] joined, position `axis` being the one that `ids` names.

    `source` has rank 0 or the rank of `ids`, and at least its sizes.
    """
    others = [number for number in range(len(ids.shape)) if number != axis]

    def places(kernel: Kernel, task: Index, step: Index, _: Any) -> tuple[Index, Any]:
        axes: list[Any] = [step.axis(0)] * len(ids.shape)
        for place, number in enumerate(others):
            axes[number] = task.axis(place)
        value = element_at(kernel, source, axes if source.shape else [])
        chosen = inside(kernel, element_at(kernel, ids, axes), base.shape[axis])
        return Index(base.shape, kernel.sizes, axes=(*axes[:axis], chosen, *axes[axis + 1 :])), value

    tasks = tuple(ids.shape[number] for number in others)
    code = scatter(base, (ids, source), tasks, (ids.shape[axis],), None, places, combine, include_base, lowering.target)
    return lowering.call(code)[0]


def _scatter(combine: str | None) -> Callable[[Lowering, Node], Any]:
    """scatter (x, dim, index, src or value), scatter_add, and scatter_reduce, whose kind is an argument."""

    def lower(lowering: Lowering, node: Node) -> Any:
        given = arguments(node)
        shape = shape_of(node.meta["val"])
        ids: View = lowering.view(given["index"])
        base: Any = lowering.tensor(given["self"])
        if 0 in ids.shape:
            return base
        number = given.get("value")
        source: Any = _constant(number, base.dtype) if "value" in given else lowering.view(given["src"])
        axis = int(given["dim"]) % max(len(shape), 1)
        if not shape:  # as one axis of one element
            base, ids = reshape(lowering, base, (1,)), lowering.view(reshape(lowering, ids, (product(ids.shape),)))
            source = source if "value" in given else lowering.view(reshape(lowering, source, ids.shape))
        kind = combine or given["reduce"]
        own = given.get("include_self", True)
        result = _along(lowering, base, ids, source, axis, _COMBINE.get(kind, "set"), own)
        if kind == "mean":
            return reshape(lowering, _mean(lowering, base, ids, axis, own, result), shape)
        return reshape(lowering, result, shape)

    return lower


def _mean(lowering: Lowering, base: Any, ids: View, axis: int, own: bool, total: View) -> Lazy:
    """Sums over how many were added up; whole numbers are rounded down."""
    zeros = Lazy(base.shape, "int64", (), lambda kernel, index: tirx.const(int(own), "int64"))
    counts = _along(lowering, zeros, ids, _constant(1, "int64"), axis, "sum")

    def element(kernel: Kernel, index: Index) -> Any:
        value = convert(kernel.load(total, index), computed_in(total.dtype))
        count = tirx.max(kernel.load(counts, index), tirx.const(1, "int64")).astype(dtype_of(value))
        return convert(value / count if is_float(total.dtype) else tirx.floordiv(value, count), total.dtype)

    return Lazy(total.shape, total.dtype, (total, counts), element)


def _index_add(lowering: Lowering, node: Node) -> Any:
    """x[..., index[k], ...] + alpha source[..., k, ...] along one axis; and index_copy, which writes."""
    given = arguments(node)
    source: Any = lowering.view(given["source"])
    ids = lowering.view(given["index"])
    base, alpha = lowering.tensor(given["self"]), given.get("alpha", 1)
    if 0 in ids.shape or 0 in source.shape:
        return base
    shape = base.shape
    if not shape:
        base, source = (reshape(lowering, value, (1,)) for value in (base, source))
    axis = int(given["dim"]) % len(base.shape)
    if "alpha" not in given and ids.shape and axis != len(shape) - 1:
        return _copy_rows(lowering, base, ids, source, axis, node in lowering.in_place)
    each = View(
        ids.storage,
        source.shape,
        tuple(ids.strides[0] if ids.shape and number == axis else 0 for number in range(len(base.shape))),
        ids.offset,
    )
    if alpha != 1:
        plain = source
        source = Lazy(plain.shape, plain.dtype, (plain,), lambda k, i: k.load(plain, i) * like(k.load(plain, i), alpha))
    result = _along(lowering, base, each, source, axis, "sum" if "alpha" in given else "set")
    return reshape(lowering, result, shape)


def _copy_rows(lowering: Lowering, base: Any, ids: View, source: View, axis: int, in_place: bool) -> View:
    """`base` with base[..., ids[k], ..., :] = source[..., k, ..., :], the last axis in vectors."""
    tasks = (*base.shape[:axis], *base.shape[axis + 1 : -1])

    def places(kernel: Kernel, task: Index, step: Index, column: Any) -> tuple[Index, Any]:
        free = [task.axis(number) for number in range(len(tasks))]
        chosen = inside(kernel, kernel.load(ids, step), base.shape[axis])
        read, written = ([*free[:axis], at, *free[axis:], column] for at in (step.axis(0), chosen))
        return Index(base.shape, kernel.sizes, axes=tuple(written)), element_at(kernel, source, read)

    reads, columns, target = (ids, source), base.shape[-1], lowering.target
    code = scatter(base, reads, tasks, ids.shape, columns, places, "set", True, target, in_place)
    return lowering.call(code, into=base.storage if in_place else None)[0]


def _index_put(lowering: Lowering, node: Node) -> Any:
    """x[i, j, :, k] = values, or += with `accumulate`; a mask where all its elements get the same values."""
    argument, given, values_argument, accumulate, *_ = arguments(node).values()
    base = lowering.tensor(argument)
    values, indices = lowering.view(values_argument), [None if i is None else lowering.view(i) for i in given]
    if any(i is not None and i.dtype == "bool" for i in indices):
        return _masked_put(lowering, node, base, indices, values, bool(accumulate))
    indices += [None] * (len(base.shape) - len(indices))
    used = [number for number, i in enumerate(indices) if i is not None]
    chosen = [i for i in indices if i is not None]
    common = shape_of(torch.broadcast_tensors(*(i.meta["val"] for i in given if i is not None))[0])
    others = [number for number in range(len(base.shape)) if number not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0
    rest: Shape = tuple(base.shape[number] for number in others)
    full = (*rest[:first], *common, *rest[first:])
    if 0 in full:
        return base
    values = expand(lowering, values, full)
    columns = base.shape[-1] if others and others[-1] == len(base.shape) - 1 else None
    tasks = rest[:-1] if columns is not None else rest

    def places(kernel: Kernel, task: Index, step: Index, column: Any) -> tuple[Index, Any]:
        free = [task.axis(number) for number in range(len(tasks))] + ([] if column is None else [column])
        steps = [step.axis(number) for number in range(len(common))]
        value = element_at(kernel, values, [*free[:first], *steps, *free[first:]])
        axes = dict(zip(others, free, strict=True))
        for number, ids in zip(used, chosen, strict=True):
            axes[number] = inside(kernel, kernel.load(ids, step), base.shape[number])
        return Index(base.shape, kernel.sizes, axes=tuple(axes[n] for n in range(len(base.shape)))), value

    combine = "sum" if accumulate else "set"
    code = scatter(base, (*chosen, values), tasks, common, columns, places, combine, True, lowering.target)
    return lowering.call(code)[0]


def _masked_put(
    lowering: Lowering, node: Node, base: Any, indices: list[View | None], values: View, accumulate: bool
) -> Lazy:
    """x[mask] = values, where values are the same for every element of the mask."""
    used = [number for number, i in enumerate(indices) if i is not None]
    mask = indices[used[0]]
    assert mask is not None
    first, rank = used[0], len(mask.shape)
    place = len(base.shape) - rank + 1 - len(values.shape)  # axes that the values lack
    varies = 0 <= first - place < len(values.shape) and values.shape[first - place] != 1
    if len(used) != 1 or varies or accumulate:
        raise CompileError(
            f"{node.name} writes different values to the elements of a mask, whose number is known when it runs; "
            "write it with where or masked_scatter"
        )

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(base.shape))]
        reduced = [*axes[:first], tirx.const(0, "int64"), *axes[first + rank :]][place:]
        at = [tirx.const(0, "int64") if size == 1 else a for size, a in zip(values.shape, reduced, strict=True)]
        flag = element_at(kernel, mask, axes[first : first + rank])
        return tirx.Select(flag, element_at(kernel, values, at), kernel.load(base, index))

    return Lazy(base.shape, base.dtype, (base, mask, values), element)


def _masked_scatter(lowering: Lowering, node: Node) -> Lazy:
    """The elements of `source` in their order to where the mask is true."""
    x, mask_argument, source_argument = arguments(node).values()
    shape = shape_of(node.meta["val"])
    base, source = lowering.tensor(x), lowering.contiguous(source_argument)
    mask = lowering.contiguous(expand(lowering, lowering.tensor(mask_argument), shape))
    count: Size = product(source.shape)
    flags = lowering.contiguous(reshape(lowering, cast(mask, "int64"), (product(shape),)))
    places = reshape(lowering, lowering.call(running(flags, 0, "int64", lowering.target))[0], shape)

    def element(kernel: Kernel, index: Index) -> Any:
        place = inside(kernel, tirx.max(kernel.load(places, index) - 1, tirx.const(0, "int64")), count)
        chosen = kernel.flat(source.storage)[place]
        return tirx.Select(kernel.load(mask, index), chosen, kernel.load(base, index))

    return Lazy(shape, base.dtype, (base, mask, source, places), element, sizes=source.shape)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.scatter.src: _scatter("set"),
    aten.scatter.value: _scatter("set"),
    aten.scatter.reduce: _scatter(None),
    aten.scatter.value_reduce: _scatter(None),
    aten.scatter_add.default: _scatter("sum"),
    aten.scatter_reduce.two: _scatter(None),
    aten.index_add.default: _index_add,
    aten.index_copy.default: _index_add,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.masked_scatter.default: _masked_scatter,
}
