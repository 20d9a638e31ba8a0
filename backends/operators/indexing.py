"""Gathers, concatenations and padding: functions that choose which element of which operand an index reads.

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
from graphopt.backends.operators.views import reshape
from graphopt.backends.sizes import Size, product, shape_of
from graphopt.backends.traffic import lazy_values
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_DEEPEST_PART = 4  # lazy values in a chain below a concatenation


def _inside(kernel: Kernel, position: Any, size: Size) -> Any:
    extent = kernel.size(size)
    position = position.astype("int64")
    position = tirx.Select(position < 0, position + extent, position)
    return tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))


def _at(kernel: Kernel, value: Any, axes: list[Any]) -> Any:
    return kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(axes)))


def _embedding(lowering: Lowering, node: Node) -> Lazy:
    table, ids = lowering.view(node.args[0]), lowering.view(node.args[1])
    rank = len(ids.shape)

    def element(kernel: Kernel, index: Index) -> Any:
        row = _at(kernel, ids, [index.axis(number) for number in range(rank)])
        return _at(kernel, table, [_inside(kernel, row, table.shape[0]), index.axis(rank)])

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
            next(others) if i is None else _inside(kernel, kernel.load(i, common), x.shape[number])
            for number, i in enumerate(indices)
        ]
        return _at(kernel, x, axes)

    return Lazy(shape, x.dtype, (x, *(i for i in indices if i is not None)), element)


def _gather(lowering: Lowering, node: Node) -> Lazy:
    argument, axis, index_argument, *_ = arguments(node).values()
    x, ids = lowering.view(argument), lowering.view(index_argument)
    axis = int(axis) % max(len(x.shape), 1)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        axes[axis] = _inside(kernel, _at(kernel, ids, axes), x.shape[axis])
        return _at(kernel, x, axes)

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
        axes[along] = _inside(kernel, kernel.load(ids, index), x.shape[along])
        return _at(kernel, x, axes)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, ids), element)


def _index_select(lowering: Lowering, node: Node) -> Lazy:
    argument, axis, index_argument, *_ = arguments(node).values()
    x, ids = lowering.view(argument), lowering.view(index_argument)
    axis = int(axis) % max(len(x.shape), 1)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(x.shape))]
        axes[axis] = _inside(kernel, _at(kernel, ids, [axes[axis]]), x.shape[axis])
        return _at(kernel, x, axes)

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
            value = _at(kernel, part, axes).astype(dtype)
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
        before = _at(kernel, source, axes)
        axes[along] = axes[along] + 1
        after = _at(kernel, source, axes)
        return not_equal(after, before) if dtype == "bool" else after - before

    return Lazy(shape, dtype, (source,), element)


def _stack(lowering: Lowering, node: Node) -> Lazy:
    tensors, axis = arguments(node).values()
    parts = [lowering.view(part) for part in tensors]
    shape = shape_of(node.meta["val"])
    axis = int(axis) % len(shape)

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(shape)) if number != axis]
        result = _at(kernel, parts[0], axes)
        for number, part in enumerate(parts[1:], start=1):
            result = tirx.Select(index.axis(axis) >= number, _at(kernel, part, axes), result)
        return result

    return Lazy(shape, DTYPES[node.meta["val"].dtype], tuple(parts), element)


def _pad(lowering: Lowering, node: Node) -> Lazy:
    """constant_pad_nd (x, pad, value) and pad (x, pad, mode, value); a negative number cuts."""
    given = arguments(node)
    if given.get("mode", "constant") != "constant":
        raise CompileError(f"{node.name} pads in mode {given['mode']!r}; only 'constant' has a lowering")
    pairs = [int(p) for p in given["pad"]]
    return padded(lowering.view(given["self"]), pairs, given["value"] or 0, shape_of(node.meta["val"]))


def padded(x: Any, pairs: list[int], fill: Any, shape: tuple[Size, ...]) -> Lazy:
    """`x` with `fill` around it; `pairs` are (before, after) from the last axis on."""
    rank = len(shape)
    before = {rank - 1 - number: pairs[2 * number] for number in range(len(pairs) // 2)}

    def element(kernel: Kernel, index: Index) -> Any:
        axes, inside = [], []
        for number in range(rank):
            position = index.axis(number)
            if number in before:
                extent = kernel.size(x.shape[number])
                position = position - before[number]
                inside += [position >= 0, position < extent]
                position = tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))
            axes.append(position)
        value = _at(kernel, x, axes)
        return tirx.Select(tirx.all(*inside), value, constant(fill, x.dtype)) if inside else value

    return Lazy(shape, x.dtype, (x,), element)


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
        return _at(kernel, x, axes)

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
        return _at(kernel, x, axes)

    shape, heads = shape_of(node.meta["val"]), x if repeated == 1 else None
    return Lazy(shape, x.dtype, (x,), element, sizes=(count,), unrepeated=heads)


def _flip(lowering: Lowering, node: Node) -> Lazy:
    x = lowering.view(node.args[0])
    flipped = {int(axis) % len(x.shape) for axis in node.args[1]}  # type: ignore[union-attr, arg-type]

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [
            kernel.size(size) - 1 - index.axis(n) if n in flipped else index.axis(n) for n, size in enumerate(x.shape)
        ]
        return _at(kernel, x, axes)

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
        return _at(kernel, x, axes)

    return Lazy(shape, x.dtype, (x,), element)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.take_along_dim.default: _take_along,
    aten.index_select.default: _index_select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.diff.default: _diff,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_each,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
}
