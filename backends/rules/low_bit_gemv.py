"""Products of 8-bit activations with weights of 1 to 8 bits, whose codes are taken apart in registers.

A panel of outputs passes over its part of the weight once, in the order of memory. For one row of activations on x86
the fields of a word are not even shifted down: masked where they lie, those at bit p add 2^p times their products to
sums of their own, which are shifted once a group. For several rows, or where numbers stand in a codebook, the parts of
each code are put together, looked up, and multiplied by all rows of a tile.

Sums of a group are int32 and exact, whichever instructions make them. Groups are added in float32 from the first to the
last, so that results depend neither on the tile nor on how threads share the panels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.low_bit_instructions import multiply_low, multiply_signed
from graphopt.backends.operations import operations
from graphopt.backends.rules.low_bit_codes import EVERY, Groups, Operands, Unpacking, shifted_down
from graphopt.backends.rules.low_bit_layout import QUAD, Field, Layout, Part
from graphopt.backends.rules.low_bit_tiles import write_tiles
from graphopt.backends.rules.register_tile import RegisterTile, Tile
from graphopt.backends.sizes import Size, least, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "low-bit"
_LINE = 64  # bytes of a cache line
_AHEAD = (8 << 10, 2 << 10)  # bytes ahead of the words that are read: the longer, the faster they are used up
_GROUPS_AHEAD = 8  # whose scales are prefetched
_OUTPUTS = (16, 32)  # of a panel: two vectors of 16 share words of activations, one reads memory more evenly
_MOST_SUMS = 16  # vectors of them in registers
_FREE_SUMS = 8  # additions to which do not wait for each other
_MOST_WRITTEN = 16  # vectors of words in a loop's body
_FEW_ROWS, _MANY_ROWS = 4, 8  # of a tile, where there are several


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    vectors: int  # of outputs of a panel
    panel_shares: int  # shares of the panels between threads
    ahead: int  # bytes ahead of which lines are prefetched
    nearest: bool  # into the first-level cache: better where weights stay in the caches, worse from memory


def offer(
    target: Target,
    rows: Size,
    layout: Callable[[int], Layout],
    end: Any,
    masked: bool,
    write: Callable[[Configuration], Code],
) -> Choice[Configuration]:
    """What may be chosen for so many rows times the weight that `layout` packs for panels of so many vectors."""
    found = candidates(target, layout)
    one = layout(found[0].vectors)
    parameters = {"rows": size_parameter(rows), "n": one.n, "k": one.k, "bits": one.bits, "group": one.group}
    parameters |= {"masked": masked}
    return Choice(Workload.of(RULE, {**parameters, **epilogue_parameters(end)}), found[0], lambda: found, write)


def candidates(target: Target, layout: Callable[[int], Layout]) -> list[Configuration]:
    """Panels of some widths, the least expected time first: narrow ones, unless threads then share worse.

    Words of one bit a weight take eight multiplications each, which bound the product, and not memory.
    """
    found = []
    one_bit = layout(layout(1).together).bits == 1
    for place, outputs in enumerate(reversed(_OUTPUTS) if one_bit else _OUTPUTS):
        one = layout(max(layout(1).together, outputs // target.lanes))
        share = -(-one.panels // target.threads) * one.outputs
        found.append((share, place, one.vectors))
    every = dict.fromkeys(vectors for *_, vectors in sorted(found))
    distances = _AHEAD[::-1] if one_bit else _AHEAD
    chosen = itertools.product((False, True), distances, every)
    return [Configuration(vectors, target.threads, ahead, nearest) for nearest, ahead, vectors in chosen]


def gemv(
    operands: Operands,
    result: Product,
    end: Any,
    name: str,
    target: Target,
    choice: Configuration,
    fewest: int | None,
) -> Code:
    """y[row, n] as graphopt::lut_gemv says, then the element-wise tree `end` over `result`.

    From `fewest` rows on there are tiles, where that is not None; the target has them then.
    """
    layout = operands.layout
    rows = product(result.shape[:-1])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        Gemv(kernel, operands, result, end, outputs[0], choice, fewest).write()

    code = write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [*operands.views(), end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "bits": layout.bits,
            "group": layout.group,
            "lanes": target.lanes,
            "vectors": choice.vectors,
            "panel_shares": choice.panel_shares,
            "ahead": choice.ahead,
            "nearest": choice.nearest,
            "products": "tiles of int8" if uses_tiles(rows, fewest) else "bits taken apart",
        },
        flops=2 * rows * layout.n * layout.k + operations([end], target),
    )
    tiled = uses_tiles(rows, fewest)
    return replace(code, function=code.function.with_attr(amx.USES_TILES, True)) if tiled else code


def uses_tiles(rows: Size, fewest: int | None) -> bool:
    return fewest is not None and (not isinstance(rows, int) or rows >= fewest)


def masks(target: Target, bits: int, book: bool) -> bool:
    """Whether one row is multiplied by fields that are not shifted down: their bytes are below 256, not 128."""
    return target.quads == "uint8" and target.machine == "x86_64" and bits < 8 and not book


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


class Gemv:
    def __init__(
        self,
        kernel: Kernel,
        operands: Operands,
        result: Product,
        end: Any,
        output: Output,
        choice: Configuration,
        fewest: int | None,
    ) -> None:
        self.kernel, self.operands, self.choice = kernel, operands, choice
        self.result, self.end, self.output = result, end, output
        self.layout, self.target, self.lanes = operands.layout, kernel.target, kernel.target.lanes
        self.unpacking = Unpacking(kernel, operands)
        self.groups = Groups(kernel, operands)
        self.weight = self.unpacking.weight
        self.codes = kernel.words(operands.codes.storage, "uint32")
        self.row_count = product(result.shape[:-1])
        self.rows = kernel.size(self.row_count)
        self.masked = masks(self.target, self.layout.bits, operands.book is not None)
        self.fewest = fewest

    def write(self) -> None:
        """Few rows are a tile of so many, also where their number is known at run time."""
        if isinstance(self.row_count, int):
            if uses_tiles(self.row_count, self.fewest):
                amx.require()
                write_tiles(self)
            else:
                self.write_shares(min(self.row_count, _MANY_ROWS))
        else:
            if self.fewest is not None:
                amx.require()
            fewest = least(self.row_count)
            below = self.fewest or _MANY_ROWS
            self.write_rows([rows for rows in (1, _FEW_ROWS) if fewest <= rows < below])

    def write_rows(self, few: list[int]) -> None:
        """A number of rows known at run time: the first of the tiles of `few` rows that holds all, else many."""
        if few:
            with T.If(self.rows > few[0]):
                with T.Then():
                    self.write_rows(few[1:])
                with T.Else():
                    self.write_shares(few[0])
        elif self.fewest is not None:
            write_tiles(self)
        else:
            self.write_shares(_MANY_ROWS)

    def write_shares(self, height: int) -> None:
        """Each thread passes over panels of its own, for all rows."""
        kernel, shares, panels = self.kernel, self.choice.panel_shares, self.layout.panels
        shares = min(shares, panels)
        tiles = tirx.truncdiv(self.rows + (height - 1), int64(height))
        with (kernel.serial if shares == 1 else kernel.parallel)(shares) as task:
            first = T.bind(tirx.truncdiv(task * panels, int64(shares)))
            own = tirx.truncdiv((task + 1) * panels, int64(shares)) - first
            with kernel.serial(own) as number:
                panel = T.bind(first + number)
                if height == 1:
                    _Tile(self, 1, int64(0), panel).write()
                else:
                    with kernel.serial(tiles) as tile:
                        _Tile(self, height, T.bind(tile * height), panel).write()


class _Tile:
    """Some rows of the results of one panel."""

    def __init__(self, gemv_: Gemv, height: int, first_row: Any, panel: Any) -> None:
        self.gemv, self.kernel, self.layout, self.height = gemv_, gemv_.kernel, gemv_.layout, height
        self.first_row, self.panel = first_row, panel
        self.masked = gemv_.masked and height == 1
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
        rows = [T.bind(row * (layout.packed_k // QUAD)) for row in self.row_numbers]
        with kernel.serial(layout.groups) as group:
            at = T.bind(self.panel * layout.groups + group)
            self.zero()
            self.tags = gemv_.unpacking.tags(T.bind(at * layout.outputs))
            self.multiply(at * layout.steps, [row + group * (layout.depth // QUAD) for row in rows])
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

    def zero(self) -> None:
        for r in range(self.height):
            for c in range(self.layout.vectors):
                for place in range(self.copies * len(self.places)):
                    with self.kernel.vectorized(self.gemv.lanes) as lane:
                        T.buffer_store(self.sums, tirx.const(0, "int32"), [r, c, place, lane])

    # Products ---------------------------------------------------------------------------------------------------------
    def multiply(self, first_step: Any, rows: list[Any]) -> None:
        """Add the products of a group; `rows` say where the words of its activations begin."""
        layout, kernel = self.layout, self.kernel
        width = layout.step_vectors * self.gemv.lanes
        start = T.bind(first_step * width)
        rows = [T.bind(row) for row in rows]
        written = min(layout.steps, max(1, _MOST_WRITTEN // layout.step_vectors // self.copies) * self.copies)
        whole = layout.steps // written

        def step(number: Any, turn: int) -> None:
            self.turn = turn % self.copies * len(self.places)
            self.step(start + number * width, [row + number * layout.quads for row in rows])

        if whole == 1:
            for number in range(written):
                step(int64(number), number)
        else:
            with kernel.serial(whole) as outer:
                for number in range(written):
                    step(outer * written + number, number)
        for number in range(whole * written, layout.steps):
            step(int64(number), number)

    def step(self, start: Any, rows: list[Any]) -> None:
        """One step of the panel, whose words begin at `start`."""
        self.prefetch(start)
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
