"""Many rows times weights of few bits on AMX tiles: the packed weights of `low_bit_gemv`, taken apart to bytes first.

A task takes pairs of vectors of outputs. Their whole depth becomes bytes in the second-level cache, four of the depth
beside each other, which is what a tile of the right side holds; then blocks of 32 rows pass over them. The int32 sums
of a group leave the tiles and are added, scaled, to those in float32 on the stack, in the order of the groups.

Steps are as deep as whole parts of a group are, up to 64. No row is computed with that does not exist: the last tiles
of rows begin 16 before the end.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.kernel import int64
from graphopt.backends.rules.amx_block import StoredRows
from graphopt.backends.rules.low_bit_layout import QUAD
from graphopt.backends.rules.register_tile import Tile

if TYPE_CHECKING:
    from graphopt.backends.rules.low_bit_gemv import Gemv

FEWEST_ROWS = 8  # fewer take vectors no longer
_PASSED_BYTES = 512 << 10  # of activations that all outputs pass over before the next ones
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers
_PAIR = 2  # vectors of outputs


def write_tiles(gemv: Gemv) -> None:
    """All rows of `gemv`, at most 16 of which are one tile high."""
    count = gemv.row_count
    if isinstance(count, int):
        _Tiles(gemv, 1 if count <= amx.ROWS else 2).write()
        return
    with T.If(gemv.rows > amx.ROWS):
        with T.Then():
            _Tiles(gemv, 2).write()
        with T.Else():
            _Tiles(gemv, 1).write()


class _Tiles:
    def __init__(self, gemv: Gemv, height: int) -> None:
        self.gemv, self.kernel, self.layout, self.height = gemv, gemv.kernel, gemv.layout, height
        depth, vectors = self.layout.depth, self.layout.vectors
        self.step = max(step for step in range(QUAD, amx.ROW_BYTES + 1, QUAD) if depth % step == 0)
        self.together = max(_PAIR, vectors)  # vectors of outputs that are taken apart at once
        self.panels = self.together // vectors  # that these are
        self.units = -(-self.layout.panels // self.panels)
        self.words = self.layout.packed_k // QUAD * amx.COLUMNS  # of one vector of outputs
        self.tall = height * amx.ROWS
        self.codes = self.kernel.words(gemv.operands.codes.storage, "uint8")

    def write(self) -> None:
        kernel, gemv = self.kernel, self.gemv
        shares = min(gemv.choice.panel_shares, self.units)
        passed = max(1, _PASSED_BYTES // (self.layout.packed_k * self.tall))
        blocks = tirx.truncdiv(gemv.rows + (self.tall - 1), int64(self.tall))
        with (kernel.serial if shares == 1 else kernel.parallel)(shares) as task:
            first = T.bind(tirx.truncdiv(task * self.units, int64(shares)))
            own = tirx.truncdiv((task + 1) * self.units, int64(shares)) - first
            bytes_ = kernel.scratch(self.together * self.words, dtype="uint32")
            totals = StoredRows(kernel, Tile(self.tall, _PAIR))
            sums = kernel.registers(self.tall, _PAIR, amx.COLUMNS, dtype="int32")
            self.configure()
            with (
                kernel.serial(tirx.truncdiv(blocks + (passed - 1), int64(passed))) as at,
                kernel.serial(own) as number,
            ):
                unit = T.bind(first + number)
                for panel in range(self.panels):
                    self.unpack(self.panel(unit, panel), bytes_, panel)
                with kernel.serial(tirx.min(int64(passed), blocks - at * passed)) as block:
                    row = T.bind((at * passed + block) * self.tall)
                    for pair in range(self.together // _PAIR):
                        self.block(unit, pair, row, bytes_, totals, sums)
            amx.release()

    def configure(self) -> None:
        memory = self.kernel.registers(amx.CONFIGURATION_BYTES, dtype="uint8")
        rows: Any = tirx.min(self.gemv.rows, int64(amx.ROWS))
        if isinstance(self.gemv.row_count, int):
            rows = min(self.gemv.row_count, amx.ROWS)
        high = dict.fromkeys((*_SUMS[: 2 * self.height], *_LEFT[: self.height]), rows)
        high |= dict.fromkeys(_RIGHT, self.step // QUAD)
        amx.write_configuration(memory, high, dict.fromkeys(_LEFT, self.step))
        amx.configure(tirx.address_of(memory[0]))

    def panel(self, unit: Any, number: int) -> Any:
        """One panel of a unit; the last one again where it does not exist."""
        return T.bind(tirx.min(unit * self.panels + number, int64(self.layout.panels - 1)))

    # Weights ----------------------------------------------------------------------------------------------------------
    def unpack(self, panel: Any, bytes_: Any, number: int) -> None:
        """Words [vector, quad of the depth, output] of a panel, whose bytes are numbers."""
        layout, lanes, unpacking = self.layout, amx.COLUMNS, self.gemv.unpacking
        with self.kernel.serial(layout.groups) as group:
            at = T.bind(panel * layout.groups + group)
            tags = unpacking.tags(at * layout.outputs)
            with self.kernel.serial(layout.steps) as step:
                start = T.bind((at * layout.steps + step) * (layout.step_vectors * lanes))
                words = [unpacking.word(start, vector) for vector in range(layout.step_vectors)]
                place = T.bind((group * layout.steps + step) * (layout.quads * lanes))
                for c in range(layout.vectors):
                    for quad in range(layout.quads):
                        begin = (number * layout.vectors + c) * self.words + quad * lanes
                        value = unpacking.value(words, quad, c, tags)
                        T.buffer_store(bytes_, value, [tirx.Ramp(place + begin, int64(1), lanes)])

    # Blocks -----------------------------------------------------------------------------------------------------------
    def start(self, row: Any) -> Any:
        """The first row of the tile that holds `row` and those after it."""
        count = self.gemv.row_count
        if isinstance(count, int) and count % self.tall == 0:
            return row
        return T.bind(tirx.max(int64(0), tirx.min(row, self.gemv.rows - amx.ROWS)))

    def block(self, unit: Any, pair: int, first_row: Any, bytes_: Any, totals: StoredRows, sums: Any) -> None:
        """The results of some rows for one pair of vectors of outputs."""
        layout, kernel = self.layout, self.kernel
        starts = [self.start(first_row + tile * amx.ROWS) for tile in range(self.height)]
        totals.zero_rows()
        with kernel.serial(layout.groups) as group:
            for tile in _SUMS[: 2 * self.height]:
                amx.zero(tile)
            with kernel.serial(layout.depth // self.step) as step:
                self.multiply(starts, pair, T.bind(group * layout.depth + step * self.step), bytes_)
            for (tile, start), c in itertools.product(enumerate(starts), range(_PAIR)):
                row = start - starts[0]  # a second tile that begins early overwrites sums with the same ones
                amx.store(_SUMS[2 * tile + c], tirx.address_of(sums[row, c, 0]), int64(4 * _PAIR * amx.COLUMNS))
            self.add(unit, pair, group, starts, totals, sums)
        totals.begin = T.bind(first_row - starts[0])
        first = unit * (self.together * amx.COLUMNS) + pair * (_PAIR * amx.COLUMNS)
        totals.write(
            self.gemv.result,
            self.gemv.end,
            self.gemv.output,
            rows=tirx.min(int64(self.tall), self.gemv.rows - first_row),
            position=lambda row: starts[0] + row,
            first=T.bind(first),
            width=layout.n,
        )

    def multiply(self, starts: list[Any], pair: int, depth: Any, bytes_: Any) -> None:
        """One step of the depth, from `depth` on."""
        width = self.layout.packed_k
        for c, tile in enumerate(_RIGHT):
            place = (pair * _PAIR + c) * self.words + depth * (amx.COLUMNS // QUAD)
            amx.load(tile, tirx.address_of(bytes_[place]), int64(amx.ROW_BYTES))
        for number, start in enumerate(starts):
            amx.load(_LEFT[number], tirx.address_of(self.codes[start * width + depth]), int64(width))
            for c in range(_PAIR):
                amx.multiply(amx.SIGNED_CODES, _SUMS[2 * number + c], _LEFT[number], _RIGHT[c])

    def add(self, unit: Any, pair: int, group: Any, starts: list[Any], totals: StoredRows, sums: Any) -> None:
        """Add the sums of a group to the totals, row after row."""
        layout, groups = self.layout, self.gemv.groups
        places = []
        for c in range(_PAIR):
            panel, vector = divmod(pair * _PAIR + c, layout.vectors)
            at = (self.panel(unit, panel) * layout.groups + group) * layout.outputs
            places.append(T.bind(at + vector * amx.COLUMNS))
        with self.kernel.serial(starts[-1] - starts[0] + tirx.min(int64(amx.ROWS), self.gemv.rows)) as row:
            of_row = groups.row(T.bind(starts[0] + row), group)
            for c, place in enumerate(places):
                with self.kernel.vectorized(amx.COLUMNS) as lane:
                    number = groups.number(of_row, sums[row, c, lane], place + lane)
                    T.buffer_store(totals.values, totals.values[row, c, lane] + number, [row, c, lane])
