"""Tensors during lowering: a view of stored memory, or a function of the index that no kernel has stored yet.

Element-wise nodes become `Lazy` values and are computed inside the kernel that needs them; that is the whole of
operator fusion for producers. What must be read with strides (transposes, slices) is a `View`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tvm import relax, tirx

from graphopt.backends.sizes import Shape, Size, Sizes, contiguous_strides, product

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory that a Relax variable names, contiguous."""

    variable: relax.Var
    shape: Shape
    dtype: str


@dataclass(frozen=True, eq=False)
class View:
    """Element (i, j, ...) lies at offset + i strides[0] + j strides[1] + ...; all in elements."""

    storage: Storage
    shape: Shape
    strides: Shape
    offset: Size = 0

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def contiguous(self) -> bool:
        """Row-major from offset 0; axes of size 1 may have any stride."""
        expected = contiguous_strides(self.shape)
        return self.offset == 0 and all(
            size == 1 or stride == want for size, stride, want in zip(self.shape, self.strides, expected, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Lazy:
    """`element(kernel, index)` is one element as an expression, reading `operands` through `kernel.load`."""

    shape: Shape
    dtype: str
    operands: tuple[Value | Product, ...]
    element: Callable[[Kernel, Index], Any]
    flat: bool = False  # reads its operands at the same linear position only
    order: tuple[int, ...] = ()  # a permutation of its only operand: axis n is the operand's axis order[n]
    name: str = ""  # of the operator, for the names of kernels
    shared: bool = False  # read several times in one kernel: bound to a variable there
    branching: bool = False  # its formula compares or selects
    borders: tuple[int, ...] = ()  # where along the last axis another part of it begins
    unrepeated: View | None = None  # [B, G, ...], where this has the same shape but R G in place of G: i reads i // R
    casts: bool = False  # its only operand in another dtype
    depth: int = field(init=False, default=1)  # longest chain of lazy values below, itself included
    branches: int = field(init=False, default=0)  # most branching values on such a chain

    def __post_init__(self) -> None:
        below = [operand for operand in self.operands if isinstance(operand, Lazy)]
        object.__setattr__(self, "depth", 1 + max((value.depth for value in below), default=0))
        object.__setattr__(self, "branches", self.branching + max((value.branches for value in below), default=0))

    sizes: Shape = ()  # symbolic sizes computed with, besides those of the shapes
    nodes: tuple[str, ...] = ()  # names of the program's nodes whose value this is

    @property
    def narrow(self) -> Value | None:
        """The bfloat16 value that this is in float32."""
        source = self.operands[0] if self.casts and self.dtype == "float32" else None
        return source if isinstance(source, (View, Lazy)) and source.dtype == "bfloat16" else None


Value = View | Lazy


@dataclass(frozen=True, eq=False)
class Product:
    """The result of a kernel still being written, at the index its epilogue asks for."""

    shape: Shape
    dtype: str
    operands: tuple[Value, ...] = ()


def whole(storage: Storage, shape: Shape | None = None) -> View:
    shape = storage.shape if shape is None else shape
    return View(storage, shape, contiguous_strides(shape))


def leaves(values: Sequence[Any]) -> Iterator[Storage]:
    """Every storage that computing `values` reads, each once, in a fixed order."""
    seen: set[int] = set()
    stack = list(reversed(values))
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, View):
            if id(value.storage) not in seen:
                seen.add(id(value.storage))
                yield value.storage
        else:
            stack.extend(reversed(value.operands))


def fused_name(first: str, value: Any) -> str:
    """A kernel's name: `first`, then the operators of the tree `value` in order of execution, at most six."""
    names: list[str] = []
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if isinstance(item, Lazy) and id(item) not in seen:
            seen.add(id(item))
            for operand in item.operands:
                visit(operand)
            names.append(item.name)

    visit(value)
    words = [first, *dict.fromkeys(name for name in names if name)]
    return "_".join(word for word in words[:7] if word) or "copy"


def permuted(value: View, order: Sequence[int]) -> View:
    """Axis n of the result is axis order[n] of the view."""
    return View(
        value.storage, tuple(value.shape[a] for a in order), tuple(value.strides[a] for a in order), value.offset
    )


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(order.index(axis) for axis in range(len(order)))


def permutation(value: Lazy | Product, order: Sequence[int]) -> Lazy:
    """The lazy value whose axis n is axis order[n] of `value`."""
    order = tuple(order)
    back = inverse(order)

    def element(kernel: Kernel, index: Index) -> Any:
        return kernel.load(value, index.permuted(back))

    return Lazy(tuple(value.shape[a] for a in order), value.dtype, (value,), element, order=order)


def placed_views(value: Any) -> Iterator[tuple[View, tuple[int, ...]]]:
    """Every view of the size of `value` read below it, with the axis of `value` that each of its axes is."""
    seen: set[Any] = set()
    stack = [(value, tuple(range(len(value.shape))))]
    while stack:
        item, order = stack.pop()
        if (id(item), order) in seen or len(item.shape) != len(order):
            continue
        seen.add((id(item), order))
        if isinstance(item, View):
            yield item, order
        elif isinstance(item, Lazy) and item.order:
            stack.append((item.operands[0], tuple(order[axis] for axis in inverse(item.order))))
        elif isinstance(item, Lazy):
            stack.extend((operand, order) for operand in item.operands if operand.shape == item.shape)


def memory_order(value: View) -> tuple[int, ...]:
    """The axes from the widest stride to the narrowest, equal ones in their own order; size 1 keeps its place."""
    strided = [a for a, size in enumerate(value.shape) if size != 1]
    by_stride = sorted(strided, key=lambda a: _typical(value.strides[a]), reverse=True)
    places = iter(by_stride)
    return tuple(next(places) if size != 1 else a for a, size in enumerate(value.shape))


def _typical(size: Size) -> int:
    """The size with every symbol at 61: enough to tell which of two strides is the wider."""
    return size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, 61)))


def preferred_order(value: Lazy) -> tuple[int, ...]:
    """The order of axes in which most of the views that `value` reads whole lie in memory; row-major where in doubt."""
    plain = tuple(range(len(value.shape)))
    votes: dict[tuple[int, ...], int] = {plain: 0}
    for view, order in placed_views(value):
        found = tuple(order[axis] for axis in memory_order(view))
        if 0 not in view.strides:
            votes[found] = votes.get(found, 0) + 1
    return max(votes, key=lambda order: votes[order])


def reads_flat(value: Any, shape: Shape, order: tuple[int, ...] = (), seen: set[Any] | None = None) -> bool:
    """True when every element reads only its own linear position in a tensor of `shape`, or scalars.

    `order`: axis n of `value` is axis order[n] of `shape`; empty where they are the same.
    """
    seen = set() if seen is None else seen
    if (id(value), order) in seen:
        return True
    seen.add((id(value), order))
    if isinstance(value, View):
        here = permuted(value, inverse(order)) if order and len(order) == len(value.shape) else value
        return (here.shape == shape and here.contiguous) or product(value.shape) == 1
    if not isinstance(value, Lazy):
        return False
    if value.order:
        outer = order or tuple(range(len(value.order)))
        below = tuple(outer[axis] for axis in inverse(value.order))
        below = () if below == tuple(range(len(below))) else below
        return reads_flat(value.operands[0], shape, below, seen)
    if order and any(operand.shape != value.shape and product(operand.shape) != 1 for operand in value.operands):
        return False
    return (value.flat or not value.operands) and all(reads_flat(o, shape, order, seen) for o in value.operands)


@dataclass(eq=False)
class Index:
    """A position in a tensor, known as axes, as (row, column) or as one linear number; the others are derived.

    A row is all axes but the last. Row and column stay the same through element-wise nodes and through reshapes that
    keep the last axis, so a kernel over rows needs no division. A permuted index remembers the index it came from, so
    that memory in that one's order is read without division too.
    """

    shape: Shape
    sizes: Sizes
    axes: tuple[Any, ...] | None = None
    row: Any = None
    column: Any = None
    linear: Any = None
    base: Index | None = None
    order: tuple[int, ...] = ()  # with a base: axis n is the base's axis order[n]
    _derived: dict[Any, Any] = field(default_factory=dict)

    def flat(self) -> Any:
        if self.linear is None:
            if self.axes is not None or self.base is not None:
                strides = contiguous_strides(self.shape)
                self.linear = tirx.const(0, "int64")
                for number, stride in enumerate(strides):
                    self.linear = self.linear + self.axis(number) * self.sizes.expr(stride)
            else:
                self.linear = self.row * self.sizes.expr(self.shape[-1] if self.shape else 1) + self.column
        return self.linear

    def axis(self, number: int) -> Any:
        """The index along one axis; sizes are positive, so truncating division is exact."""
        if self.axes is not None:
            return self.axes[number]
        if self.base is not None:
            return self.base.axis(self.order[number])
        if self.shape[number] == 1:
            return tirx.const(0, "int64")
        last = len(self.shape) - 1
        if self.column is not None and number == last:
            return self.column
        if self.column is not None:
            position, below = self.row, product(self.shape[number + 1 : last])
        else:
            position, below = self.linear, product(self.shape[number + 1 :])
        if below != 1:
            position = tirx.truncdiv(position, self.sizes.expr(below))
        if product(self.shape[:number]) != 1:
            position = tirx.truncmod(position, self.sizes.expr(self.shape[number]))
        return position

    def broadcast(self, shape: Shape) -> Index:
        """The position in an operand of this shape, aligned at the last axis as NumPy does."""
        if shape == self.shape:
            return self
        if shape not in self._derived:
            skip = len(self.shape) - len(shape)
            zero = tirx.const(0, "int64")
            axes = tuple(zero if size == 1 else self.axis(skip + number) for number, size in enumerate(shape))
            self._derived[shape] = Index(shape, self.sizes, axes=axes)
        return self._derived[shape]

    def permuted(self, order: tuple[int, ...]) -> Index:
        """The same position with axis n counted where this index has axis order[n]."""
        base = self if self.base is None else self.base
        composed = order if self.base is None else tuple(self.order[axis] for axis in order)
        if composed == tuple(range(len(composed))):
            return base
        key = ("permuted", composed)
        if key not in base._derived:
            shape = tuple(base.shape[axis] for axis in composed)
            base._derived[key] = Index(shape, self.sizes, base=base, order=composed)
        return cast("Index", base._derived[key])

    def reshaped(self, shape: Shape) -> Index:
        """The position of the same element once the tensor is reshaped to `shape`."""
        if shape == self.shape:
            return self
        key = ("reshaped", shape)
        if key not in self._derived:
            self._derived[key] = self._reshaped(shape)
        return self._derived[key]

    def _reshaped(self, shape: Shape) -> Index:
        same_columns = bool(shape and self.shape) and shape[-1] == self.shape[-1]
        if self.column is not None and same_columns:
            return Index(shape, self.sizes, row=self.row, column=self.column)
        if self.axes is not None or self.base is not None:
            if (axes := self._merged(shape)) is not None:
                return Index(shape, self.sizes, axes=axes)
            if same_columns:
                outer = tuple(self.axis(number) for number in range(len(self.shape) - 1))
                row = Index(self.shape[:-1], self.sizes, axes=outer).flat()
                return Index(shape, self.sizes, row=row, column=self.axis(len(outer)))
        return Index(shape, self.sizes, linear=self.flat())

    def _merged(self, shape: Shape) -> tuple[Any, ...] | None:
        """The axes of `shape` where each is some neighbouring axes of this index together, else nothing."""
        given = [(size, self.axis(number)) for number, size in enumerate(self.shape) if size != 1]
        axes = []
        for size in shape:
            reached: Size = 1
            position = tirx.const(0, "int64")
            while reached != size and given:
                inner, at = given.pop(0)
                position = at if reached == 1 else position * self.sizes.expr(inner) + at
                reached = reached * inner
            if reached != size:
                return None
            axes.append(position)
        return tuple(axes)
