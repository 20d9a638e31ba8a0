"""Operators that only change how memory is read: strides on a view, or the index of a lazy value; nothing is copied
unless no strides can express the result."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.sizes import Shape, Size, contiguous_strides, product, shape_of, size_of
from graphopt.backends.values import Index, Lazy, Product, View, permutation, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


def reshape(lowering: Lowering, value: Any, shape: Shape) -> View | Lazy:
    """The same elements in the same order under another shape."""
    if isinstance(value, (Lazy, Product)):

        def element(kernel: Kernel, index: Index) -> Any:
            return kernel.load(value, index.reshaped(value.shape))

        return Lazy(shape, value.dtype, (value,), element, flat=True)
    strides = reshaped_strides(value, shape)
    if strides is None:
        value = lowering.contiguous(value)
        strides = contiguous_strides(shape)
    return View(value.storage, shape, strides, value.offset)


def reshaped_strides(value: View, shape: Shape) -> Shape | None:
    """Strides that read `value` as `shape`, or None where only a copy can."""
    if value.contiguous:
        return contiguous_strides(shape)
    old = [(size, stride) for size, stride in zip(value.shape, value.strides, strict=True) if size != 1]
    new = [size for size in shape if size != 1]
    common = 0
    while common < min(len(old), len(new)) and old[common][0] == new[common]:
        common += 1
    rest = old[common:]
    if any(stride != size * inner for (_, stride), (size, inner) in pairwise(rest)):
        return None
    unit = rest[-1][1] if rest else 1
    strides = [stride for _, stride in old[:common]]
    strides += [stride * unit for stride in contiguous_strides(tuple(new[common:]))]
    pending = iter(strides)
    return tuple(0 if size == 1 else next(pending) for size in shape)


def _reshape(lowering: Lowering, node: Node) -> View | Lazy:
    value, shape = lowering.tensor(node.args[0]), shape_of(node.meta["val"])
    if isinstance(value, View) and {user.target for user in node.users} == {_ATTENTION}:
        heads = _unrepeated(value, shape)
        if heads is not None:
            return _repeated(value, heads, shape)
    return reshape(lowering, value, shape)


def _unrepeated(value: View, shape: Shape) -> View | None:
    """[B, G, T, D] where `value` is [B, G, R, T, D] with equal elements along R and `shape` is [B, G R, T, D]."""
    if len(value.shape) != 5 or value.strides[2] != 0:
        return None
    batch, groups, repeats, *rest = value.shape
    return _taken(value, 2, 0) if shape == (batch, groups * repeats, *rest) else None


def _repeated(value: View, heads: View, shape: Shape) -> Lazy:
    """Attention reads `heads`; the repeated ones are stored only where it has no use for those."""

    def element(kernel: Kernel, index: Index) -> Any:
        return kernel.load(value, index.reshaped(value.shape))

    return Lazy(shape, value.dtype, (value,), element, unrepeated=heads)


def _permuted(lowering: Lowering, node: Node) -> View | Lazy:
    value, order = lowering.tensor(node.args[0]), permutation_of(node)
    return permuted(value, order) if isinstance(value, View) else permutation(value, order)


def permutation_of(node: Node) -> tuple[int, ...]:
    """For a node that only permutes axes: which axis of its operand each axis is; otherwise nothing."""
    if node.target not in PERMUTATIONS:
        return ()
    order, target = list(range(_rank(node))), node.target
    if target in (aten.t.default, aten.numpy_T.default):
        return tuple(reversed(order))
    given = list(arguments(node).values())[1:]
    if target is aten.permute.default:
        return tuple(int(axis) % len(order) for axis in given[0])
    if target is aten.transpose.int:
        first, second = (int(axis) % len(order) for axis in given)
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    sources, places = ([int(a) % len(order) for a in (x if isinstance(x, list) else [x])] for x in given)
    order = [axis for axis in order if axis not in sources]  # movedim: the others keep their order
    for place, axis in sorted(zip(places, sources, strict=True)):
        order.insert(place, axis)
    return tuple(order)


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _expand(lowering: Lowering, node: Node) -> Any:
    return expand(lowering, lowering.tensor(node.args[0]), shape_of(node.meta["val"]))


def _pixel_shuffle(lowering: Lowering, node: Node) -> View | Lazy:
    """[..., C r r, H, W] to [..., C, H r, W r]."""
    x, factor = arguments(node).values()
    view = lowering.contiguous(x)
    *lead, channels, height, width = view.shape
    blocks = reshape(lowering, view, (*lead, channels // factor**2, factor, factor, height, width))
    first = len(lead)
    order = [*range(first), *(first + n for n in (0, 3, 1, 4, 2))]
    return reshape(lowering, permuted(lowering.view(blocks), order), shape_of(node.meta["val"]))


def expand(lowering: Lowering, value: Any, shape: Shape) -> Any:
    """Repeated axes get stride 0; a lazy value is stored small and read often."""
    if value.shape == shape:
        return value
    view = lowering.view(value)
    skip = len(shape) - len(view.shape)
    strides: list[Size] = [0] * skip
    for old, stride in zip(view.shape, view.strides, strict=True):
        strides.append(0 if old == 1 else stride)  # two symbols may be one size, so sizes are not compared
    return View(view.storage, shape, tuple(strides), view.offset)


def _broadcast(lowering: Lowering, node: Node) -> tuple[Any, ...]:
    parts = zip(node.args[0], node.meta["val"], strict=True)  # type: ignore[arg-type]
    return tuple(expand(lowering, lowering.tensor(part), shape_of(meta)) for part, meta in parts)


def _meshgrid(lowering: Lowering, node: Node) -> tuple[Any, ...]:
    """Vector i varies along axis i of the grid; with indexing "xy" the first two axes are exchanged."""
    vectors, indexing = arguments(node).values()
    axes = [1, 0, *range(2, len(vectors))] if indexing == "xy" and len(vectors) > 1 else range(len(vectors))
    grids = []
    for vector, axis, result in zip(vectors, axes, node.meta["val"], strict=True):
        shape = shape_of(result)
        line = tuple(size if number == axis else 1 for number, size in enumerate(shape))
        grids.append(expand(lowering, reshape(lowering, lowering.tensor(vector), line), shape))
    return tuple(grids)


def clamped(position: Any, size: Size) -> Size:
    """A start or index, counted from the end when negative, kept between 0 and the size."""
    if isinstance(position, int) and position < 0:
        return size + position if not isinstance(size, int) else max(size + position, 0)
    if isinstance(position, int) and isinstance(size, int):
        return min(position, size)
    if position == 0:
        return 0
    if isinstance(position, int) or position.is_nonnegative:
        return sympy.Min(position, size)
    if position.is_nonpositive:
        return sympy.Max(0, size + position)
    raise CompileError(f"a slice starts at {position}, which may be negative or not; write it from one end")


def _slice(lowering: Lowering, node: Node) -> View:
    x, axis, start, _, step = (lowering.value(argument) for argument in arguments(node).values())
    view = lowering.view(x)
    axis = int(axis) % len(view.shape)
    first = clamped(0 if start is None else start, view.shape[axis])
    return _part(view, axis, first, shape_of(node.meta["val"]), int(step or 1))


def _part(view: View, axis: int, first: Size, shape: Shape, step: int = 1) -> View:
    strides = tuple(stride * step if number == axis else stride for number, stride in enumerate(view.strides))
    return View(view.storage, shape, strides, view.offset + first * view.strides[axis])


def _select(lowering: Lowering, node: Node) -> View:
    view = lowering.view(node.args[0])
    axis = int(node.args[1]) % len(view.shape)  # type: ignore[arg-type]
    position = lowering.value(node.args[2])
    if isinstance(position, int) and position < 0:
        position = view.shape[axis] + position
    return _taken(view, axis, position)


def _taken(view: View, axis: int, position: Any) -> View:
    """The part at one place along an axis, which is left out."""
    keep = [number for number in range(len(view.shape)) if number != axis]
    offset = view.offset + position * view.strides[axis]
    return View(view.storage, tuple(view.shape[a] for a in keep), tuple(view.strides[a] for a in keep), offset)


def _split(lowering: Lowering, node: Node) -> tuple[View, ...]:
    """split, split_with_sizes, chunk: the sizes of the parts are those of the node's own values."""
    given = arguments(node)
    view = lowering.view(given["self"])
    axis = int(given["dim"]) % len(view.shape)
    parts, first = [], 0
    for part in node.meta["val"]:
        shape = shape_of(part)
        parts.append(_part(view, axis, first, shape))
        first = first + shape[axis]
    return tuple(parts)


def _unbind(lowering: Lowering, node: Node) -> tuple[View, ...]:
    given = arguments(node)
    view = lowering.view(given["self"])
    axis = int(given["dim"]) % len(view.shape)
    count = int(size_of(view.shape[axis]))
    return tuple(_taken(view, axis, place) for place in range(count))


def _windows(lowering: Lowering, node: Node) -> View:
    """unfold: windows along an axis become a new last axis; they overlap in memory."""
    x, axis, _, step = arguments(node).values()
    view = lowering.view(x)
    axis = int(axis) % len(view.shape)
    strides = [stride * step if number == axis else stride for number, stride in enumerate(view.strides)]
    return View(view.storage, shape_of(node.meta["val"]), (*strides, view.strides[axis]), view.offset)


def _diagonal(lowering: Lowering, node: Node) -> View:
    """The elements at (i, i + offset) along two axes as a new last axis."""
    x, offset, *pair = arguments(node).values()
    view = lowering.view(x)
    first, second = (int(axis) % len(view.shape) for axis in pair)
    keep = [axis for axis in range(len(view.shape)) if axis not in (first, second)]
    start = view.offset + (offset * view.strides[second] if offset > 0 else -offset * view.strides[first])
    strides = (*(view.strides[axis] for axis in keep), view.strides[first] + view.strides[second])
    return View(view.storage, shape_of(node.meta["val"]), strides, start)


def _as_strided(lowering: Lowering, node: Node) -> View:
    """Elements by their place in the operand's memory, which has to be contiguous, as PyTorch has it and here."""
    x, _, strides, offset = arguments(node).values()
    meta, shape = x.meta["val"], shape_of(node.meta["val"])
    if not meta.is_contiguous() or meta.storage_offset() != 0:
        raise CompileError(
            f"{node.name} reads memory that its operand does not fill in order; make it contiguous first"
        )
    steps, start = tuple(size_of(step) for step in strides), size_of(offset or 0)
    if not all(isinstance(size, int) for size in (*shape_of(meta), *shape, *steps, start)):
        raise CompileError(f"{node.name} reads memory by places that depend on symbolic sizes; index it instead")
    if start + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) >= product(shape_of(meta)):
        raise CompileError(f"{node.name} reads memory outside its operand; read inside it")
    return View(lowering.contiguous(x).storage, shape, steps, start)


def _item(lowering: Lowering, node: Node) -> Any:
    values, position = node.args
    return lowering.value(values)[position]


def keeps_rows(node: Node) -> bool:
    """True for a reshape that an epilogue may hold: rows and columns stay what they are."""
    if node.target not in RESHAPES:
        return False
    before, after = shape_of(node.args[0].meta["val"]), shape_of(node.meta["val"])  # type: ignore[union-attr]
    return bool(before and after and before[-1] == after[-1] and product(before) == product(after))


RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)

PERMUTATIONS = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.numpy_T.default,
        aten.movedim.intlist,
        aten.movedim.int,
    }
)

TABLE: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PERMUTATIONS, _permuted),
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_tensors.default: _broadcast,
    aten.meshgrid.indexing: _meshgrid,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.unfold.default: _windows,
    aten.diagonal.default: _diagonal,
    aten.as_strided.default: _as_strided,
    operator.getitem: _item,
}
