"""A tile of sums in registers: rows x vectors of columns, the core of every matrix product and convolution.

One step of the depth costs a load for each vector of columns, a broadcast for each row and rows x vectors
multiply-adds: 3 + 8 against 24 for 8 x 48 with AVX-512, so the multiply-adds bound it. `choose_tile` weighs tiles that
fit the registers by the work that they waste on rows and columns that do not exist: 64 columns are not padded to 96.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import DataType, tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.code_instructions import PACKED
from graphopt.backends.instructions import multiply_pairs
from graphopt.backends.kernel import Kernel, Output, int64
from graphopt.backends.rules.code_stores import packs, store_codes
from graphopt.backends.rules.lanes import same, span
from graphopt.backends.sizes import Size
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, inverse, permuted, placed_views

_MANY_ROWS = 840  # stands for a number of rows known at run time: a multiple of most tiles' rows
_MOST_APART = 11  # rows with an address each
_MOST_VECTORS = 6
_LATENCY = 8  # multiply-adds that two units start before the first is done
_LINE = 64  # bytes of a cache line
_TILE_STEPS = 12  # what starting and ending a tile costs, as steps of one multiply-add for each of its vectors


@dataclass(frozen=True)
class Writing:
    """Where the element at a row and column of a tile is stored, and what its sum becomes there."""

    output: Output
    place: Callable[[int, Any], Any]
    element: Callable[[int, Any, Any], Any]

    def store(self, row: int, column: Any, total: Any) -> None:
        self.output.store(self.place(row, column), self.element(row, column, total))


@dataclass(frozen=True)
class Tile:
    """Rows and vectors of columns held in registers, and steps of the depth written out."""

    rows: int
    vectors: int
    steps: int = 4


def tiles(target: Target, apart: bool = False, temporaries: int = 0) -> Iterator[Tile]:
    """Every tile whose sums, a step's vectors of the right side and its next broadcasts fit the registers.

    `apart`: rows of the left side lie at addresses of their own. x86-64 has general registers for eleven; with 13 rows,
    of which two addresses are read from memory in each step, a product takes 1.4 to 3 times as long.

    With fewer registers left each multiply-add broadcasts for itself, which costs a load each: 7 x 64 is slower than
    6 x 64 with AVX-512. With NEON the steps of a row are one vector, whose lanes are multiplied by number.

    `temporaries`: registers that a multiply-add of several instructions takes besides.
    """
    spare, each_row = (3, 1) if target.lanes == 4 else (4, 0) if target.registers == 32 else (1, 0)
    spare += temporaries
    most = _MOST_APART if apart and target.lanes != 4 else target.registers
    for vectors in range(1, _MOST_VECTORS + 1):
        for rows in range(1, min(most, (target.registers - vectors - spare) // (vectors + each_row)) + 1):
            yield Tile(rows, vectors)


@cache
def choose_tile(
    target: Target, rows: Size, columns: int, depth: int = 256, apart: bool = False, temporaries: int = 0
) -> Tile:
    """The tile with the least time for a product of this size; `rows` known at run time are taken as many."""
    many = rows if isinstance(rows, int) else _MANY_ROWS
    return min(tiles(target, apart, temporaries), key=lambda tile: tile_cost(target, tile, many, columns, depth))


def tile_cost(target: Target, tile: Tile, rows: int, columns: int, depth: int) -> float:
    """Time of rows x columns x depth in multiply-adds of one vector.

    A step takes as long as its multiply-adds, its loads or the wait for the sums of the step before. The right side
    comes from the L2 cache, so that its loads cost more than broadcasts.
    """
    count = -(-rows // tile.rows) * -(-columns // (tile.vectors * target.lanes))
    loads = 2.5 * tile.vectors + tile.rows
    step = max(tile.rows * tile.vectors, loads, _LATENCY) + 0.13 * loads
    return count * (depth * step + _TILE_STEPS * tile.rows * tile.vectors)


def lanes_of(target: Target, dtype: str) -> int:
    """Elements of one vector register."""
    return target.lanes // 2 if dtype == "float64" else target.lanes


class RegisterTile:
    """The sums of one tile while its code is written: `values` [rows, vectors, lanes] of `dtype`."""

    def __init__(self, kernel: Kernel, tile: Tile, dtype: str = "float32") -> None:
        self.kernel, self.tile, self.dtype = kernel, tile, dtype
        self.lanes = lanes_of(kernel.target, dtype)
        self.values = kernel.registers(tile.rows, tile.vectors, self.lanes, dtype=dtype)

    def value(self, row: int, vector: int, lane: Any) -> Any:
        """One sum."""
        return self.values[row, vector, lane]

    def zero(self) -> None:
        for r, c, lane in self.elements():
            T.buffer_store(self.values, tirx.const(0, self.dtype), [r, c, lane])

    def multiply(
        self,
        extent: Any,
        left: Callable[[int, Any], Any],
        right: Callable[[Any, int, Any], Any],
        before_step: Callable[[Any], None] | None = None,
    ) -> None:
        """Add left(row, k) * right(k, vector, lane) over k below `extent`, in this order, to what the tile holds.

        `before_step(number)` writes what each group of `tile.steps` steps begins with, such as a prefetch.
        """
        steps = self.tile.steps
        main = extent // steps if isinstance(extent, int) else tirx.truncdiv(extent, int64(steps))
        if not (isinstance(main, int) and main == 0):
            with self.kernel.serial(main) as outer:
                if before_step:
                    before_step(outer)
                self._steps(outer * steps, left, right)
        if isinstance(extent, int):
            for k in range(extent - extent % steps, extent):
                self._step(int64(k), left, right)
        else:
            with self.kernel.serial(extent - main * steps) as rest:
                self._step(main * steps + rest, left, right)

    def _steps(self, first: Any, left: Callable[[int, Any], Any], right: Callable[[Any, int, Any], Any]) -> None:
        """All steps that are written out, from `first` on."""
        for inner in range(self.tile.steps):
            self._step(first + inner, left, right)

    def _step(self, k: Any, left: Callable[[int, Any], Any], right: Callable[[Any, int, Any], Any]) -> None:
        values = self.values
        for r in range(self.tile.rows):
            for c in range(self.tile.vectors):
                with self.kernel.vectorized(self.lanes) as lane:
                    T.buffer_store(values, values[r, c, lane] + left(r, k) * right(k, c, lane), [r, c, lane])

    def keep(self, memory: Any, start: Any) -> None:
        """Store the sums so far in `memory`, to go on with later."""
        for r, c, lane in self.elements():
            T.buffer_store(memory, self.values[r, c, lane], [self._place(start, r, c) + lane])

    def read(self, memory: Any, start: Any) -> None:
        """Go on with the sums that `keep` stored there."""
        for r, c, lane in self.elements():
            T.buffer_store(self.values, memory[self._place(start, r, c) + lane], [r, c, lane])

    def elements(self) -> Iterator[tuple[int, int, Any]]:
        """Every row, vector and lane, inside of the loop over lanes."""
        for r in range(self.tile.rows):
            for c in range(self.tile.vectors):
                with self.kernel.vectorized(self.lanes) as lane:
                    yield r, c, lane

    def _place(self, start: Any, r: int, c: int) -> Any:
        return start + (r * self.tile.vectors + c) * self.lanes

    def prefetch(self, end: Any, output: Output, position: Callable[[int], Any], first: Any) -> None:
        """Ask for the lines that `write` will read and store, so that they arrive while the sums are made.

        Where few steps make a tile of a large result, waiting for them takes up to a tenth of the time.
        """
        width = self.kernel.size(end.shape[-1])
        buffers = [self.kernel.flat(view.storage) for view in _read_in_place(end) if view.dtype != "bool"]
        if output.dtype != "bool":  # bytes, whose addresses are not those of truth values
            buffers.insert(0, output.flat)
        for r in range(self.tile.rows):
            for c, buffer in ((c, buffer) for c in range(self.tile.vectors) for buffer in buffers):
                if c * self.lanes * _width(buffer) % _LINE < self.lanes * _width(buffer):  # the first of its line
                    address = tirx.address_of(buffer[position(r) * width + first + c * self.lanes])
                    stores = int(buffer is output.flat)
                    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, stores, 3, 1))

    def write(
        self,
        result: Product,
        end: Any,
        output: Output,
        *,
        rows: Any,
        position: Callable[[int], Any],
        first: Any,
        width: Size,
        before: Any = 0,
    ) -> None:
        """Store the element-wise tree `end` over `result`, whose elements the tile holds.

        Row r of the tile exists where r < rows, and is row position(r) of the result, counted over all axes but the
        last. Its columns begin at `before + first`; those from `before + width` on do not exist.
        """

        def place(r: int, at: Any) -> Any:
            return position(r) * self.kernel.size(end.shape[-1]) + (before + first + at)

        def element(r: int, at: Any, value: Any) -> Any:
            self.kernel.define(result, lambda _: value)
            index = self.kernel.index(end.shape, row=position(r), column=before + first + at)
            return self.kernel.load(end, index)

        writing = Writing(output, place, element)
        self.each_row(rows, lambda r: self._write_row(r, first, width, writing))

    def each_row(self, rows: Any, write: Callable[[Any], None]) -> None:
        """Write the rows of the tile that exist, each by its number: registers have no other."""
        for r in range(self.tile.rows):
            if isinstance(rows, int):
                if r < rows:
                    write(r)
                continue
            with T.If(r < rows), T.Then():
                write(r)

    def _write_row(self, r: int, first: Any, width: Size, writing: Writing) -> None:
        """All vectors, or those of the last columns."""
        columns = self.tile.vectors * self.lanes
        if isinstance(width, int) and width % columns == 0:
            self._write_columns(r, columns, writing)
        elif isinstance(width, int) and width < columns:
            self._write_columns(r, width, writing)
        else:
            with T.If(first + columns <= self.kernel.size(width)):
                with T.Then():
                    self._write_columns(r, columns, writing)
                with T.Else():
                    if isinstance(width, int):
                        self._write_columns(r, width % columns, writing)
                    else:
                        self._write_some(r, self.kernel.size(width) - first, writing)

    def _write_some(self, r: int, columns: Any, writing: Writing) -> None:
        """Columns whose number is known at run time, one by one out of memory: sums in registers have no numbers."""
        row = self.kernel.registers(self.tile.vectors * self.lanes, dtype=self.dtype)
        for c in range(self.tile.vectors):
            with self.kernel.vectorized(self.lanes) as lane:
                T.buffer_store(row, self.values[r, c, lane], [c * self.lanes + lane])
        with self.kernel.serial(columns) as at:
            writing.store(r, at, row[at])
        self.kernel.forget()

    def _write_columns(self, r: int, columns: int, writing: Writing) -> None:
        """Whole vectors; what is left of one goes in parts of 8, 4, 2 and 1 lanes.

        Codes of several vectors are narrowed together, which clips them too.
        """
        begin = 0
        for count in PACKED if packs(self.kernel, writing.output) and self.lanes == self.kernel.target.lanes else ():
            while columns // self.lanes - begin >= count:
                self._write_codes(r, begin, count, writing)
                begin += count
        parts = [(c, 0, self.lanes) for c in range(begin, columns // self.lanes)]
        start, part = 0, self.lanes // 2
        while part:
            if columns % self.lanes & part:
                parts.append((columns // self.lanes, start, part))
                start += part
            part //= 2
        for c, start, count in parts:
            with self.kernel.vectorized(count) as lane:
                writing.store(r, c * self.lanes + start + lane, self.values[r, c, start + lane])

    def _write_codes(self, r: int, begin: int, count: int, writing: Writing) -> None:
        def element(vector: int, lane: Any) -> Any:
            c = begin + vector
            return writing.element(r, c * self.lanes + lane, self.values[r, c, lane])

        store_codes(self.kernel, writing.output, writing.place(r, begin * self.lanes), count, element)


class PairTile(RegisterTile):
    """Sums of products of bfloat16: `left` and `right` give pairs of the depth, uint32, `right` a vector of them."""

    def _step(self, k: Any, left: Callable[[int, Any], Any], right: Callable[[Any, int, Any], Any]) -> None:
        whole = span(0, self.lanes)
        for r in range(self.tile.rows):
            pair = same(left(r, k), self.lanes)
            for c in range(self.tile.vectors):
                total = multiply_pairs(self.values[r, c, whole], pair, right(k, c, whole))
                T.buffer_store(self.values, total, [r, c, whole])


def _width(buffer: Any) -> int:
    """Bytes of an element."""
    return DataType(str(buffer.dtype)).itemsize


def _read_in_place(end: Any) -> list[View]:
    """The views that `end` reads at its own linear position."""
    views = [permuted(view, inverse(order)) for view, order in placed_views(end)]
    return [view for view in views if view.shape == end.shape and view.contiguous]
