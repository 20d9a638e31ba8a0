"""Gathers and concatenations: functions that choose which element of which operand an index reads.

Positions read from a tensor are wrapped when negative, as PyTorch does, and then kept inside the table, so that a wrong
id reads a wrong row but never foreign memory. PyTorch raises there; a session cannot know without looking at every id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import constant, not_equal
from graphopt.backends.operators.views import clamped, reshape
from graphopt.backends.sizes import Shape, Size, product, shape_of
from graphopt.backends.traffic import lazy_values
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_DEEPEST_PART = 4  # lazy values in a chain below a concatenation


def inside(kernel: Kernel, position: Any, size: Size) -> Any:
    extent = kernel.size(size)
    position = position.astype("int64")
    position = tirx.Select(position < 0, position + extent, position)
    return tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))


def element_at(kernel: Kernel, value: Any, axes: list[Any]) -> Any:
    return kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(axes)))


def _repeated(x: View, shape: Shape) -> Lazy:
    """The only element of `x`, which has rank 0, everywhere."""
    return Lazy(shape, x.dtype, (x,), lambda kernel, index: element_at(kernel, x, []))


def _embedding(lowering: Lowering, node: Node) -> Lazy:
    table, ids = lowering.view(node.args[0]), lowering.view(node.args[1])
    rank = len(ids.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        row = element_at(kernel, ids, [index.axis(number) for number in range(rank)])
        return element_at(kernel, table, [inside(kernel, row, table.shape[0]), index.axis(rank)])

    return Lazy(shape_of(node.meta["val"]), table.dtype, (table, ids), element)


def _index(lowering: Lowering, node: Node) -> Lazy:
    """x[i, j, :, k]: indexed axes are replaced by the index tensors' broadcast, in place when they are adjacent."""
    argument, given = arguments(node).values()
    x = lowering.view(argument)
    indices = [None if i is None else lowering.view(i) for i in given]
    indices += [None] * (len(x.shape) - len(indices))
    used = [number for number, i in enumerate(indices) if i is not None]
    if any(i is not None and i.dtype == "bool" for i in indices):
        raise CompileError(f"{node.name} indexes with a mask, so its result has no fixed shape; write it with where")
    shape = shape_of(node.meta["val"])
    rank = max(len(indices[number].shape) for number in used)  # type: ignore[union-attr]
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0

    def element(kernel: Kernel, index: Index) -> Any:
        common = Index(
            shape[first : first + rank], kernel.sizes, axes=tuple(index.axis(first + n) for n in range(rank))
        )
        others = iter([index.axis(n) for n in range(len(shape)) if not first <= n < first + rank])
        axes = [
            next(others) if i is None else inside(kernel, kernel.load(i, common), x.shape[number])
            for number, i in enumerate(indices)
        ]
        return element_at(kernel, x, axes)

    return Lazy(shape, x.dtype, (x, *(i for i in indices if i is not None)), element)


def _gather(lowering: Lowering, node: Node) -> Lazy:
    argument, axis, index_argument, *_ = arguments(node).values()
    x, ids = lowering.view(argument), lowering.view(index_argument)
    if not x.shape:
        return _repeated(x, shape_of(node.meta["val"]))
    axis = int(axis) % len(x.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        axes[axis] = inside(kernel, element_at(kernel, ids, axes), x.shape[axis])
        return element_at(kernel, x, axes)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, ids), element)


def _take_along(lowering: Lowering, node: Node) -> Lazy:
    """take_along_dim: as gather, but axes of size 1 broadcast; without an axis both are flattened."""
    argument, ids_argument, axis = arguments(node).values()
    x: Any = lowering.view(argument)
    ids: Any = lowering.view(ids_argument)
    if axis is None:
        x, ids, axis = (*(reshape(lowering, v, (product(v.shape),)) for v in (x, ids)), 0)
    along = int(axis) % len(x.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [
            tirx.const(0, "int64") if size == 1 and number != along else index.axis(number)
            for number, size in enumerate(x.shape)
        ]
        axes[along] = inside(kernel, kernel.load(ids, index), x.shape[along])
        return element_at(kernel, x, axes)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, ids), element)


def _index_select(lowering: Lowering, node: Node) -> Lazy:
    argument, axis, index_argument, *_ = arguments(node).values()
    x, ids = lowering.view(argument), lowering.view(index_argument)
    if not x.shape:
        return _repeated(x, shape_of(node.meta["val"]))
    axis = int(axis) % len(x.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        axes[axis] = inside(kernel, element_at(kernel, ids, [axes[axis]]), x.shape[axis])
        return element_at(kernel, x, axes)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, ids), element)


def _cat(lowering: Lowering, node: Node) -> Lazy:
    tensors, axis = arguments(node).values()
    shape = shape_of(node.meta["val"])
    axis = int(axis) % len(shape)
    parts = [lowering.tensor(part) for part in tensors]
    parts = [part for part in parts if len(part.shape) == len(shape) and part.shape[axis] != 0]
    split = bool(_borders(parts, axis))
    parts = [part if split and _is_straight(part) else lowering.view(part) for part in parts]
    return joined(parts, axis, shape, DTYPES[node.meta["val"].dtype])


def _is_straight(part: View | Lazy) -> bool:
    """Cheap enough to be computed, at a position kept inside it, where another part's element is wanted."""
    if isinstance(part, View) or part.branches or part.depth > _DEEPEST_PART:
        return False
    return all(value.flat for value in lazy_values([part]))


def _borders(parts: Sequence[View | Lazy], axis: int) -> tuple[int, ...]:
    """Where parts joined along the last axis begin, but the first; nothing where sizes are known at run time only."""
    sizes = [size for part in parts if axis == len(part.shape) - 1 and isinstance(size := part.shape[axis], int)]
    return tuple(accumulate(sizes))[:-1] if len(sizes) == len(parts) else ()


def joined(parts: Sequence[View | Lazy], axis: int, shape: tuple[Size, ...], dtype: str) -> Lazy:
    """Each element is read from its own part; positions are kept inside the others, whose values are not chosen."""

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(shape))]
        position, result = axes[axis], None
        for part in parts:
            extent = kernel.size(part.shape[axis])
            axes[axis] = tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))
            value = element_at(kernel, part, axes).astype(dtype)
            result = value if result is None else tirx.Select(position >= 0, value, result)
            position = position - extent
        return result

    return Lazy(shape, dtype, tuple(parts), element, borders=_borders(parts, axis))


def _diff(lowering: Lowering, node: Node) -> Any:
    """diff (x, n, axis, prepend, append): neighbours' differences along an axis, of flags where they differ."""
    x, count, axis, prepend, append = arguments(node).values()
    if count != 1:
        raise CompileError(f"{node.name} takes differences {count} times; once has a lowering")
    shape, rank = shape_of(node.meta["val"]), len(shape_of(node.meta["val"]))
    along = int(axis) % rank
    parts = [lowering.view(part) for part in (prepend, x, append) if part is not None]
    dtype = parts[0].dtype
    longer = tuple(size + 1 if number == along else size for number, size in enumerate(shape))
    source: Any = parts[0] if len(parts) == 1 else joined(parts, along, longer, dtype)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(rank)]
        before = element_at(kernel, source, axes)
        axes[along] = axes[along] + 1
        after = element_at(kernel, source, axes)
        return not_equal(after, before) if dtype == "bool" else after - before

    return Lazy(shape, dtype, (source,), element)


def _stack(lowering: Lowering, node: Node) -> Lazy:
    tensors, axis = arguments(node).values()
    parts = [lowering.view(part) for part in tensors]
    shape = shape_of(node.meta["val"])
    axis = int(axis) % len(shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(shape)) if number != axis]
        result = element_at(kernel, parts[0], axes)
        for number, part in enumerate(parts[1:], start=1):
            result = tirx.Select(index.axis(axis) >= number, element_at(kernel, part, axes), result)
        return result

    return Lazy(shape, DTYPES[node.meta["val"].dtype], tuple(parts), element)


def _triangle(upper: bool) -> Callable[[Lowering, Node], Lazy]:
    def lower(lowering: Lowering, node: Node) -> Lazy:
        argument, diagonal = arguments(node).values()
        x = lowering.tensor(argument)
        shape = shape_of(node.meta["val"])

        def element(kernel: Kernel, index: Index) -> Any:
            distance = index.axis(len(shape) - 1) - index.axis(len(shape) - 2)
            keep = distance >= diagonal if upper else distance <= diagonal
            return tirx.Select(keep, kernel.load(x, index), constant(0, x.dtype))

        return Lazy(shape, x.dtype, (x,), element)

    return lower


def _repeat(lowering: Lowering, node: Node) -> Lazy:
    x = lowering.view(node.args[0])
    shape = shape_of(node.meta["val"])
    skip = len(shape) - len(x.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [tirx.truncmod(index.axis(skip + n), kernel.size(size)) for n, size in enumerate(x.shape)]
        return element_at(kernel, x, axes)

    return Lazy(shape, x.dtype, (x,), element)


def _repeat_each(lowering: Lowering, node: Node) -> Lazy:
    """repeat_interleave by a number; without an axis of the flattened tensor."""
    argument, repeats, axis, _ = arguments(node).values()
    x: Any = lowering.view(argument)
    if axis is None:
        x, axis = reshape(lowering, x, (product(x.shape),)), 0
    repeated = int(axis) % len(x.shape)
    count = lowering.value(repeats)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        axes[repeated] = tirx.truncdiv(axes[repeated], kernel.size(count))
        return element_at(kernel, x, axes)

    shape, heads = shape_of(node.meta["val"]), x if repeated == 1 else None
    return Lazy(shape, x.dtype, (x,), element, sizes=(count,), unrepeated=heads)


def _flip(lowering: Lowering, node: Node) -> Lazy:
    x = lowering.view(node.args[0])
    flipped = {int(axis) % len(x.shape) for axis in node.args[1]}  # type: ignore[union-attr, arg-type]

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [
            kernel.size(size) - 1 - index.axis(n) if n in flipped else index.axis(n) for n, size in enumerate(x.shape)
        ]
        return element_at(kernel, x, axes)

    return Lazy(x.shape, x.dtype, (x,), element)


def _roll(lowering: Lowering, node: Node) -> Lazy:
    """Shifted along axes, coming back in at the other end; without axes along the flattened tensor."""
    argument, shifts, dims = arguments(node).values()
    x: Any = lowering.view(argument)
    shape = x.shape
    if not dims:
        x, dims = reshape(lowering, x, (product(shape),)), [0]
    moved = {int(axis) % len(x.shape): int(shift) for axis, shift in zip(dims, shifts, strict=True)}

    def element(kernel: Kernel, index: Index) -> Any:
        index = index.reshaped(x.shape)
        axes = []
        for number, size in enumerate(x.shape):
            position = index.axis(number)
            if number in moved:
                position = tirx.floormod(position - moved[number], kernel.size(size))
            axes.append(position)
        return element_at(kernel, x, axes)

    return Lazy(shape, x.dtype, (x,), element)


def _with_slice(lowering: Lowering, node: Node) -> Any:
    """select_scatter and slice_scatter: `x` with `part` in place of some positions along an axis."""
    given = arguments(node)
    x, part = lowering.tensor(given["self"]), lowering.view(given["src"])
    axis, narrower = int(given["dim"]) % len(x.shape), "index" in given
    start, step = (lowering.value(given["index"]), 1) if narrower else (lowering.value(given["start"]), given["step"])
    count: Size = 1 if narrower else part.shape[axis]
    if narrower and isinstance(start, int) and start < 0:
        first: Size = x.shape[axis] + start
    else:
        first = clamped(0 if start is None else start, x.shape[axis])
    if 0 in part.shape:
        return x

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        distance = axes[axis] - kernel.size(first)
        place = tirx.truncdiv(tirx.max(distance, tirx.const(0, "int64")), tirx.const(int(step), "int64"))
        inside = [distance >= 0, tirx.EQ(place * int(step), distance), place < kernel.size(count)]
        axes[axis] = tirx.min(place, kernel.size(count) - 1)
        chosen = element_at(kernel, part, axes[:axis] + axes[axis + 1 :] if narrower else axes)
        return tirx.Select(tirx.all(*inside), chosen, kernel.load(x, index))

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, part), element, sizes=(first,))


TABLE: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.take_along_dim.default: _take_along,
    aten.index_select.default: _index_select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.diff.default: _diff,
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_each,
    aten.select_scatter.default: _with_slice,
    aten.slice_scatter.default: _with_slice,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
}
