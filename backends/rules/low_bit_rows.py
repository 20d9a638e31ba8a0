"""Tiles of rows times one panel of outputs: words of the weight taken apart, products added up, groups scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import int64
from graphopt.backends.low_bit_instructions import multiply_low, multiply_signed
from graphopt.backends.rules.low_bit_codes import EVERY, shifted_down
from graphopt.backends.rules.low_bit_layout import QUAD, Field, Layout, Part
from graphopt.backends.rules.register_tile import RegisterTile, Tile
from graphopt.backends.values import View

if TYPE_CHECKING:
    from graphopt.backends.rules.low_bit_gemv import Gemv

_LINE = 64  # bytes of a cache line
_GROUPS_AHEAD = 8  # whose scales are prefetched
_FREE_SUMS = 8  # additions to which do not wait for each other
_MOST_WRITTEN = 16  # vectors of words in a loop's body


def _places(layout: Layout) -> tuple[int, ...]:
    """The bits from which on sums of their own hold products."""
    return (0, 4) if layout.parts[0].bits == 4 else (0, 2, 4, 6)


def _downs(part: Part, places: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """For a field at each bit: by how much its word is shifted down, and the place of the sums that it then adds to."""
    free = {place + part.place: place for place in places if place + part.place + part.bits <= 8}
    found: dict[int, tuple[int, int]] = {}
    used = [0]
    for position in range(0, 8, part.bits):
        fitting = [down for down in used if position - down in free]
        if not fitting:
            fitting = [min((position - at for at in free), key=abs)]
            used += fitting
        found[position] = (fitting[0], free[position - fitting[0]])
    return found


class RowTile:
    """Some rows of the results of one panel."""

    def __init__(self, gemv_: Gemv, height: int, first_row: Any, panel: Any) -> None:
        self.gemv, self.kernel, self.layout, self.height = gemv_, gemv_.kernel, gemv_.layout, height
        self.first_row, self.panel = first_row, panel
        self.masked = self.masks()
        self.places = _places(self.layout) if self.masked else (0,)
        self.totals = RegisterTile(self.kernel, Tile(height, self.layout.vectors))
        taken = height * self.layout.vectors * len(self.places)
        self.copies = max(1, min(_FREE_SUMS // taken, self.layout.steps))  # steps take turns
        self.turn = 0
        shape = (height, self.layout.vectors, self.copies * len(self.places), gemv_.lanes)
        self.sums = self.kernel.registers(*shape, dtype="int32")
        self.whole = height == 1 or (isinstance(gemv_.row_count, int) and gemv_.row_count % height == 0)
        self.row_numbers = [
            T.bind(first_row + r if self.whole else tirx.min(first_row + r, gemv_.rows - 1)) for r in range(height)
        ]

    def write(self) -> None:
        gemv_, layout, kernel = self.gemv, self.layout, self.kernel
        self.totals.zero()
        with kernel.serial(layout.groups) as group:
            at = T.bind(self.panel * layout.groups + group)
            self.zero()
            self.tags = gemv_.unpacking.tags(T.bind(at * layout.outputs))
            self.multiply(at * layout.steps, T.bind(group * layout.steps))
            self.add(group, T.bind(at * layout.outputs))
        self.totals.write(
            gemv_.result,
            gemv_.end,
            gemv_.output,
            rows=self.height if self.whole else T.bind(gemv_.rows - self.first_row),
            position=lambda r: self.first_row + r,
            first=T.bind(self.panel * layout.outputs),
            width=layout.n,
        )

    def masks(self) -> bool:
        """Whether fields are multiplied where they lie."""
        return self.gemv.masked and self.height == 1

    def zero(self) -> None:
        for r in range(self.height):
            for c in range(self.layout.vectors):
                for place in range(self.copies * len(self.places)):
                    with self.kernel.vectorized(self.gemv.lanes) as lane:
                        T.buffer_store(self.sums, tirx.const(0, "int32"), [r, c, place, lane])

    # Products ---------------------------------------------------------------------------------------------------------
    def multiply(self, first_step: Any, first: Any) -> None:
        """Add the products of a group: steps from `first_step` on of the weight, from `first` on of each row."""
        layout, kernel = self.layout, self.kernel
        width = layout.step_vectors * self.gemv.lanes
        start = T.bind(first_step * width)
        written = min(layout.steps, max(1, _MOST_WRITTEN // layout.step_vectors // self.copies) * self.copies)
        whole = layout.steps // written

        def step(number: Any, turn: int) -> None:
            self.turn = turn % self.copies * len(self.places)
            self.step(start + number * width, first + number)

        if whole == 1:
            for number in range(written):
                step(int64(number), number)
        else:
            with kernel.serial(whole) as outer:
                for number in range(written):
                    step(outer * written + number, number)
        for number in range(whole * written, layout.steps):
            step(int64(number), number)

    def step(self, start: Any, number: Any) -> None:
        """Step `number` of the rows, with the words of the panel from `start` on."""
        self.prefetch(start)
        rows = [T.bind(row * (self.layout.packed_k // QUAD) + number * self.layout.quads) for row in self.row_numbers]
        if self.masked:
            self.masked_step(start, rows[0])
            return
        words = [self.gemv.unpacking.word(start, number) for number in range(self.layout.step_vectors)]
        for quad in range(self.layout.quads):
            for c in range(self.layout.vectors):
                value = self.gemv.unpacking.value(words, quad, c, self.tags)
                for r, row in enumerate(rows):
                    self.add_products(r, c, self.turn, value, row + quad)

    def masked_step(self, start: Any, row: Any) -> None:
        layout = self.layout
        fields: dict[int, list[tuple[int, int, Field]]] = {}
        for quad in range(layout.quads):
            for c in range(layout.vectors):
                for field in layout.fields(quad, c):
                    fields.setdefault(field.vector, []).append((quad, c, field))
        downs = {part: _downs(part, self.places) for part in layout.parts}
        for number in sorted(fields):
            shifted = {0: self.gemv.unpacking.word(start, number)}
            for quad, c, field in fields[number]:
                down, place = downs[field.part][field.position]
                if down not in shifted:
                    shifted[down] = T.bind(shifted_down(shifted[0], down, self.gemv.lanes))
                mask = (1 << field.part.bits) - 1 << field.position - down
                value = shifted[down] & self.gemv.unpacking.same(mask * EVERY)
                self.add_products(0, c, self.turn + self.places.index(place), value, row + quad)

    def add_products(self, row: int, vector: int, place: int, value: Any, word: Any) -> None:
        gemv_, lanes = self.gemv, self.gemv.lanes
        whole = tirx.Ramp(int64(0), int64(1), lanes)
        total, right = self.sums[row, vector, place, whole], tirx.Broadcast(gemv_.codes[word], lanes)
        if gemv_.target.quads == "uint8":
            total = multiply_quads(total, value, right, lanes)
        elif gemv_.operands.book is not None or gemv_.layout.bits == 8:
            total = multiply_signed(gemv_.target, total, value, right)
        else:
            total = multiply_low(gemv_.target, total, value, right)
        T.buffer_store(self.sums, total, [row, vector, place, whole])

    def prefetch(self, start: Any) -> None:
        """Touch the lines that lie as far ahead as was chosen, as many as this step reads."""
        gemv_ = self.gemv
        words = self.layout.step_vectors * gemv_.lanes
        for line in range(-(-words * 4 // _LINE)):
            address = tirx.address_of(gemv_.weight[start + (gemv_.choice.ahead + line * _LINE) // 4])
            near = 3 if gemv_.choice.nearest else 2
            T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, near, 1))

    # Groups -----------------------------------------------------------------------------------------------------------
    def add(self, group: Any, start: Any) -> None:
        """Add the finished sums of a group to the totals; `start`: where its scales begin in those of the weight."""
        gemv_, totals = self.gemv, self.totals.values
        self.prefetch_scales(start)
        for r, row in enumerate(self.row_numbers):
            of_row = gemv_.groups.row(row, group)
            for c in range(self.layout.vectors):
                with self.kernel.vectorized(gemv_.lanes) as lane:
                    whole = self.sum_of(r, c, 0, lane)
                    for number, place in enumerate(self.places[1:], 1):
                        whole = whole + (self.sum_of(r, c, number, lane) >> tirx.const(place, "int32"))
                    number = gemv_.groups.number(of_row, whole, start + c * gemv_.lanes + lane)
                    T.buffer_store(totals, totals[r, c, lane] + number, [r, c, lane])

    def prefetch_scales(self, start: Any) -> None:
        """Touch those of a group some groups ahead."""
        for view in (self.gemv.operands.weight_scale, self.gemv.operands.weight_zero):
            if isinstance(view, View):
                flat, each = self.kernel.flat(view.storage), np.dtype(view.dtype).itemsize
                outputs = self.layout.outputs
                for line in range(-(-outputs * each // _LINE)):
                    place = start + _GROUPS_AHEAD * outputs + line * _LINE // each
                    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(flat[place]), 0, 3, 1))

    def sum_of(self, row: int, vector: int, place: int, lane: Any) -> Any:
        """One sum of a group, of those that steps took turns to add to."""
        parts = [self.sums[row, vector, copy * len(self.places) + place, lane] for copy in range(self.copies)]
        return sum(parts[1:], parts[0])
