"""Products by looking sums of activations up in one table at a time, for instructions that have 16 entries of a byte.

A vector of bytes has half bytes of as many outputs, all looked up in the same two tables. What is found are bytes of
different outputs, so that they are widened to 16 bits, two of an output together, and add up there, for each plane of
the weight on its own; before such sums can be too large they become int32, times the place of the plane.

Exact sums of four codes of activations are in two tables as in `low_bit_lut`: the lower four bits, and the rest.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import int64
from graphopt.backends.look_up_instructions import MOST_FOUND, add_found, add_small, widened
from graphopt.backends.rules.low_bit_layout import QUAD
from graphopt.backends.rules.low_bit_nibbles import BLOCK
from graphopt.backends.rules.low_bit_rows import RowTile

if TYPE_CHECKING:
    from graphopt.backends.rules.low_bit_gemv import Gemv

_ENTRIES = 16
_LOW = 4  # bits of an exact sum in the lower table
_WRITTEN = 4  # steps in a loop's body
_LINE_WORDS = 16  # of a cache line
_MOST = 32767  # of sums of 16 bits


class NibbleTables(Protocol):
    """Where the tables of a row are.

    `places` are those of the bits of each kind of table, `furthest` is what the entries of a step sum up to at most.
    """

    places: tuple[int, ...]
    furthest: int

    def add(self, kind: int, total: Any, words: list[Any], number: Any) -> Any:
        """total + what tables of a kind have for the words of steps from `number` on, one or two."""
        ...


class LookedUpNibbles(RowTile):
    """The results of one row for one panel."""

    def __init__(self, gemv: Gemv, row: Any, panel: Any, tables: NibbleTables) -> None:
        super().__init__(gemv, 1, row, panel)
        self.tables, self.blocks = tables, self.layout.vectors // BLOCK
        self.copies = 1
        shape = (self.layout.bits, len(tables.places), self.blocks, BLOCK * gemv.lanes)
        self.found = self.kernel.registers(*shape, dtype="int16")

    def masks(self) -> bool:
        return False

    def multiply(self, first_step: Any, first: Any) -> None:
        steps = self.layout.steps
        if steps <= MOST_FOUND:
            self.part(first_step, first, steps)
            return
        with self.kernel.serial(steps // MOST_FOUND) as number:
            self.part(first_step + number * MOST_FOUND, first + number * MOST_FOUND, MOST_FOUND)
        if rest := steps % MOST_FOUND:
            done = steps - rest
            self.part(first_step + done, first + done, rest)

    def part(self, first_step: Any, first: Any, steps: int) -> None:
        """Add the products of so many steps, few enough for sums of 16 bits."""
        width = self.layout.step_vectors * self.gemv.lanes
        start, first = T.bind(first_step * width), T.bind(first)
        for place in self.every():
            zero = tirx.Broadcast(tirx.const(0, "int16"), BLOCK * self.gemv.lanes)
            T.buffer_store(self.found, zero, [*place, self.whole_block()])
        if whole := steps // _WRITTEN:
            with self.kernel.serial(whole) as outer:
                for number in range(0, _WRITTEN, 2):
                    at = T.bind(outer * _WRITTEN + number)
                    self.pair(start + at * width, first + at, 2)
        for number in range(whole * _WRITTEN, steps, 2):
            self.pair(start + number * width, first + number, min(2, steps - number))
        for block in range(self.blocks):
            self.widen(block, steps * self.tables.furthest)

    def widen(self, block: int, furthest: int) -> None:
        """Add what was found to the sums of int32; sums of a plane are at most `furthest`."""
        lanes, terms = self.gemv.lanes, []
        for plane in range(self.layout.bits):
            of_plane = [
                (self.found[plane, kind, block, self.whole_block()], place)
                for kind, place in enumerate(self.tables.places)
            ]
            if furthest <= _MOST:
                terms.append((self.together(of_plane), plane))
            else:
                terms += [(found, plane + place) for found, place in of_plane]
        if furthest * (2**self.layout.bits - 1) <= _MOST:
            terms = [(self.together(terms), 0)]
        for (found, by), vector in itertools.product(terms, range(BLOCK)):
            whole = [0, block * BLOCK + vector, 0, tirx.Ramp(int64(0), int64(1), lanes)]
            sums = widened(found, vector, lanes)
            if by:
                sums = sums << tirx.Broadcast(tirx.const(by, "int32"), lanes)
            T.buffer_store(self.sums, self.sums[tuple(whole)] + sums, whole)

    def together(self, terms: list[tuple[Any, int]]) -> Any:
        """Sums of 16 bits, each times its place."""
        total = None
        for found, by in terms:
            term = found << tirx.Broadcast(tirx.const(by, "int16"), BLOCK * self.gemv.lanes) if by else found
            total = term if total is None else total + term
        return T.bind(total)

    def pair(self, start: Any, number: Any, count: int) -> None:
        """One step or two, with the words of the panel from `start` on."""
        layout, unpacking = self.layout, self.gemv.unpacking
        width = layout.step_vectors * self.gemv.lanes
        for step in range(1 if 2 * width <= _LINE_WORDS else count):
            self.prefetch(start + step * width)
        for plane in range(layout.bits):
            for block in range(self.blocks):
                vectors = [step * layout.step_vectors + plane * self.blocks + block for step in range(count)]
                words = [unpacking.word(start, vector) for vector in vectors]
                for kind in range(len(self.tables.places)):
                    place = [plane, kind, block, self.whole_block()]
                    total = self.tables.add(kind, self.found[tuple(place)], words, number)
                    T.buffer_store(self.found, total, place)

    def every(self) -> list[tuple[int, int, int]]:
        """Sums of 16 bits: plane, kind and block."""
        kinds = range(len(self.tables.places))
        return [
            (plane, kind, block) for plane in range(self.layout.bits) for kind in kinds for block in range(self.blocks)
        ]

    def whole_block(self) -> Any:
        return tirx.Ramp(int64(0), int64(1), BLOCK * self.gemv.lanes)


class GivenNibbles:
    """Tables of graphopt::lut_build."""

    places: tuple[int, ...] = (0,)
    furthest = 2 * 127

    def __init__(self, gemv: Gemv, row: Any) -> None:
        self.lanes = gemv.lanes
        self.tables = gemv.kernel.flat(gemv.operands.codes.storage)
        self.row = T.bind(row * (gemv.layout.packed_k // QUAD * _ENTRIES))

    def add(self, kind: int, total: Any, words: list[Any], number: Any) -> Any:
        for step, word in enumerate(words):
            address = tirx.address_of(self.tables[self.row + (number + step) * (2 * _ENTRIES)])
            total = add_found(total, word, address, self.lanes)
        return total


class SummedNibbles:
    """Tables of a row of codes, in memory of a task: [two steps, kind, quad of them, entry].

    Codes of so few bits that exact sums are looked up have an even number of steps.
    """

    places: tuple[int, ...] = (0, _LOW)
    furthest = 2 * QUAD * 127

    def __init__(self, gemv: Gemv) -> None:
        self.gemv, self.kernel, self.lanes = gemv, gemv.kernel, gemv.lanes
        self.width = gemv.layout.packed_k
        self.codes = self.kernel.flat(gemv.operands.codes.storage)
        self.tables = self.kernel.scratch(2 * self.width // QUAD * _ENTRIES, dtype="int8")

    def make(self, row: Any) -> None:
        """Fill the tables with the sums of a row."""
        chosen = [[-(entry >> number & 1) for entry in range(_ENTRIES)] for number in range(QUAD)]
        masks = [tirx.Shuffle([tirx.const(n, "int16") for n in each], list(range(_ENTRIES))) for each in chosen]
        with self.kernel.serial(self.width // QUAD) as quad:
            total = None
            for number, mask in enumerate(masks):
                code = self.codes[row * self.width + quad * QUAD + number].astype("int16")
                term = tirx.Broadcast(code, _ENTRIES) & mask
                total = term if total is None else total + term
            total = T.bind(total)
            pair, inside = tirx.truncdiv(quad, int64(4)), tirx.truncmod(quad, int64(4))
            place = T.bind((pair * 8 + inside) * _ENTRIES)
            self.store(place, total & _same((1 << _LOW) - 1))
            self.store(place + 4 * _ENTRIES, total >> _same(_LOW))

    def store(self, place: Any, numbers: Any) -> None:
        T.buffer_store(self.tables, numbers.astype(f"int8x{_ENTRIES}"), [tirx.Ramp(place, int64(1), _ENTRIES)])

    def add(self, kind: int, total: Any, words: list[Any], number: Any) -> Any:
        first, second = words
        return add_small(
            total, first, second, tirx.address_of(self.tables[(number + kind) * (4 * _ENTRIES)]), self.lanes
        )


def _same(number: int) -> Any:
    return tirx.Broadcast(tirx.const(number, "int16"), _ENTRIES)
