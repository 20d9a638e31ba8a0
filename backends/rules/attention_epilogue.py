"""What follows attention element by element, such as a gate, computed on a tile of rows while it is in the L1 cache.

What has one number a row of a head, such as a head-wise gate, is computed once for each: for a tile of 8 rows one
sigmoid, of a vector of 8. Everything else is computed once a channel, in whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import BOUND, Kernel, Output, int64
from graphopt.backends.rules.lanes import settled
from graphopt.backends.sizes import Shape
from graphopt.backends.values import Index, Lazy, Product, inverse


@dataclass(frozen=True)
class Epilogue:
    """The element-wise tree `end` over `result`, the bare result, which has the elements of `shape` [B, S, H, D]."""

    kernel: Kernel
    shape: Shape
    result: Product
    end: Any
    output: Output

    @property
    def bare(self) -> bool:
        """Nothing follows but a rounding."""
        end = self.end
        while isinstance(end, Lazy) and (end.order or end.casts):
            (end,) = end.operands
        return end is self.result

    def write(self, batch: Any, first: Any, rows: Any, most: int, head: Any) -> None:
        """Finish rows of a head, from `first` on and `most` at most, whose bare results lie in the output."""
        kernel, lanes, (_, length, heads, depth) = self.kernel, self.kernel.target.lanes, self.shape
        numbers = self.write_numbers(batch, first, rows, most, head)
        with kernel.serial(rows) as number:
            row = settled(kernel, first + number)
            at_row = (batch * kernel.size(length) + row) * kernel.size(heads) + head
            start, of_row = settled(kernel, at_row * int(depth)), [each[number] for each in numbers]
            with kernel.serial(int(depth) // lanes) as vector:
                self.write_vector(start, (batch, row, head), vector * lanes, lanes, of_row)
            if rest := int(depth) % lanes:
                self.write_vector(start, (batch, row, head), int64(int(depth) - rest), rest, of_row)

    def write_numbers(self, batch: Any, first: Any, rows: Any, most: int, head: Any) -> list[Any]:
        """What has one number a row, in small buffers."""
        zero = int64(0)
        buffers = [self.kernel.registers(most, dtype=value.dtype) for value, _ in self._values(batch, zero, head)]
        if buffers:
            with self.kernel.vectorized(most) as lane:
                found = self._values(batch, first + tirx.min(lane, rows - 1), head)
                for buffer, (value, at) in zip(buffers, found, strict=True):
                    T.buffer_store(buffer, self.kernel.load(value, at), [lane])
        return buffers

    def write_vector(self, start: Any, axes: tuple[Any, Any, Any], channel: Any, lanes: int, of_row: list[Any]) -> None:
        kernel = self.kernel
        with kernel.vectorized(lanes) as lane:
            bare = T.bind(self.output.flat[start + channel + lane])
            kernel.define(self.result, lambda _: bare)
            index = self._index(*axes, channel + lane)
            for (value, at), number in zip(self._one_a_row(index), of_row, strict=True):
                kernel.know(value, at, number)
            self.output.store(start + channel + lane, kernel.load(self.end, index))

    def _values(self, batch: Any, row: Any, head: Any) -> list[tuple[Lazy, Index]]:
        return self._one_a_row(self._index(batch, row, head, int64(0)))

    def _one_a_row(self, index: Index) -> list[tuple[Lazy, Index]]:
        """Nothing where a row is one channel: what has one number a row may then be made from the result."""
        return [] if self.shape[-1] == 1 else _one_a_row(self.end, index)

    def _index(self, *axes: Any) -> Index:
        index = Index(self.shape, self.kernel.sizes, axes=axes)
        return index.reshaped(self.result.shape).reshaped(self.end.shape)


def _one_a_row(end: Any, index: Index) -> list[tuple[Lazy, Index]]:
    """The largest lazy values below `end` that have one number a row, and where they are read.

    An operand that is not read there is computed for nothing.
    """
    found: list[tuple[Lazy, Index]] = []
    seen: set[tuple[int, int]] = set()
    stack = [(end, index)]
    while stack:
        value, at = stack.pop()
        if not isinstance(value, Lazy) or at.shape[-1] == 1 or (id(value), id(at)) in seen:
            continue
        seen.add((id(value), id(at)))
        for operand in value.operands:
            if not isinstance(operand, Lazy) or (below := _at(value, operand.shape, at)) is None:
                continue
            if operand.shape and operand.shape[-1] == 1 and operand.dtype in BOUND:
                found.append((operand, below))
            else:
                stack.append((operand, below))
    return found


def _at(value: Lazy, shape: Shape, index: Index) -> Index | None:
    """Where the element of `value` at `index` reads an operand of this shape, if anywhere known."""
    if value.order:
        return index.permuted(inverse(value.order))
    skip = len(value.shape) - len(shape)
    if skip >= 0 and all(size in (1, value.shape[skip + number]) for number, size in enumerate(shape)):
        return index.broadcast(shape)
    return index.reshaped(shape) if value.flat else None
