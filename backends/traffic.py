"""What reading a tree of values touches in memory, and which nodes of the program it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy

from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.values import Lazy, Storage, View


def elements_read(values: Sequence[Any]) -> dict[Storage, Size]:
    """How many different elements of each storage computing all of `values` reads.

    A gather reads at most one element for each of its own, whatever the size of its table. Views that overlap in other
    ways than being equal are counted apart, up to the whole storage.
    """
    found: dict[Storage, dict[tuple[Shape, Shape, Size], Size]] = {}
    seen: set[int] = set()
    stack: list[tuple[Any, Size | None]] = [(value, None) for value in reversed(values)]
    while stack:
        value, most = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, View):
            count = product(d for d, stride in zip(value.shape, value.strides, strict=True) if stride != 0)
            parts = found.setdefault(value.storage, {})
            parts[value.shape, value.strides, value.offset] = _least(count, most)
            continue
        for operand in reversed(value.operands):
            limit = most if _broadcasts(operand.shape, value.shape) else _least(product(value.shape), most)
            stack.append((operand, limit))
    return {
        storage: _least(sum(parts.values(), start=0), product(storage.shape)) if len(parts) > 1 else sum(parts.values())
        for storage, parts in found.items()
    }


def _least(size: Size, most: Size | None) -> Size:
    if most is None or size == most:
        return size
    return min(size, most) if isinstance(size, int) and isinstance(most, int) else sympy.Min(size, most)


def _broadcasts(shape: Shape, to: Shape) -> bool:
    """Whether `to` has each element of `shape` at least once, so that its number says nothing new."""
    skip = len(to) - len(shape)
    return skip >= 0 and all(size in (1, to[skip + number]) for number, size in enumerate(shape))


def lazy_values(values: Sequence[Any]) -> Iterator[Lazy]:
    """Every lazy value that computing `values` evaluates, each once, operands first."""
    seen: set[int] = set()

    def visit(value: Any) -> Iterator[Lazy]:
        if id(value) in seen:
            return
        seen.add(id(value))
        for operand in getattr(value, "operands", ()):
            yield from visit(operand)
        if isinstance(value, Lazy):
            yield value

    for value in values:
        yield from visit(value)


def nodes_computed(values: Sequence[Any]) -> tuple[str, ...]:
    """Names of the nodes whose values are computed on the way to `values`, each once, in order of execution."""
    return tuple(dict.fromkeys(name for value in lazy_values(values) for name in value.nodes))
