"""Products by looking sums of activations up, after T-MAC (arXiv 2407.00088): half a byte of the weight is an index.

A table has 16 entries for four bytes of depth, and an instruction looks up the bytes of a vector of words in four of
them, one for each byte of a word. What it finds are four numbers of the same output: an instruction that multiplies
quads adds them up, times the place of the bits.

Tables of bytes are what graphopt::lut_build gives. For codes of activations a table holds the sum of each choice of
bits, which takes more than a byte: its lower four bits, and the rest. They are exact; a task makes them for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import int64
from graphopt.backends.low_bit_instructions import look_up_64
from graphopt.backends.rules.low_bit_codes import EVERY, shifted_down
from graphopt.backends.rules.low_bit_layout import QUAD, TURNED, Part
from graphopt.backends.rules.low_bit_rows import RowTile
from graphopt.backends.target import Target

if TYPE_CHECKING:
    from graphopt.backends.rules.low_bit_gemv import Gemv

MOST_ROWS = 4  # that pass over a weight one after the other
_HALF = 4  # bits of an index
_ENTRIES = 1 << _HALF
_LANES = 16  # words of four tables, and of a vector
_TABLES = 0x30201000  # where the table of each byte of a word begins
_LOW = 4  # bits of an exact sum in the lower table


def looks_up(target: Target) -> bool:
    """Whether an instruction looks up bytes in four tables, and another adds quads of them."""
    return "avx512vbmi" in target.features and target.quads == "uint8" and target.lanes == _LANES


class Tables(Protocol):
    """Where the tables of a row are."""

    def find(self, number: Any, part: Part, quad: int) -> list[tuple[int, Any]]:
        """For the half bytes from `quad` on in step `number`: vectors of four tables, and what their entries count."""
        ...


class LookedUp(RowTile):
    """The results of one row for one panel."""

    def __init__(self, gemv: Gemv, row: Any, panel: Any, tables: Tables) -> None:
        super().__init__(gemv, 1, row, panel)
        self.tables = tables

    def masks(self) -> bool:
        return False

    def step(self, start: Any, number: Any) -> None:
        self.prefetch(start)
        layout, unpacking = self.layout, self.gemv.unpacking
        words: dict[int, Any] = {}
        for place, part in enumerate(layout.parts):
            for quad in range(0, layout.quads, _HALF // part.bits):
                tables = self.tables.find(number, part, quad)
                for c in range(layout.vectors):
                    field = list(layout.fields(quad, c))[place]
                    if field.vector not in words:
                        words[field.vector] = unpacking.word(start, field.vector)
                    half = shifted_down(words[field.vector], field.position, _LANES)
                    index = half & unpacking.same(0x0F * EVERY) | unpacking.same(_TABLES)
                    for count, table in tables:
                        self.add_found(c, count << part.place, look_up_64(index, table))

    def add_found(self, vector: int, count: int, found: Any) -> None:
        """Add entries times `count` to the sums of a vector of outputs."""
        whole = [0, vector, self.turn, tirx.Ramp(int64(0), int64(1), _LANES)]
        same = self.gemv.unpacking.same(count * EVERY)
        T.buffer_store(self.sums, multiply_quads(self.sums[tuple(whole)], same, found, _LANES), whole)


class GivenTables:
    """Those of graphopt::lut_build, the same for every part."""

    def __init__(self, gemv: Gemv, row: Any) -> None:
        self.gemv, self.layout = gemv, gemv.layout
        self.row = T.bind(row * gemv.layout.packed_k)

    def find(self, number: Any, part: Part, quad: int) -> list[tuple[int, Any]]:
        first = self.row + (number * self.layout.quads + quad) * QUAD
        return [(1, T.bind(self.gemv.codes[tirx.Ramp(first, int64(1), _LANES)]))]


class SummedTables:
    """Those of a row of codes, in memory of a task."""

    def __init__(self, gemv: Gemv) -> None:
        self.gemv, self.kernel, self.layout = gemv, gemv.kernel, gemv.layout
        blocks = self.layout.packed_k // TURNED
        self.starts: dict[int, int] = {}  # by the bits of a part
        size = 0
        for part in self.layout.parts:
            self.starts[part.bits] = size
            size += blocks * part.bits * 2 * _LANES
        self.words = self.kernel.scratch(size, dtype="uint32")
        self.bytes = T.decl_buffer([4 * size], "int8", data=self.words.data, layout=None)
        self.turned = self.kernel.scratch(self.layout.packed_k // QUAD, dtype="uint32")

    def find(self, number: Any, part: Part, quad: int) -> list[tuple[int, Any]]:
        at = (number * self.layout.quads + quad) * part.bits  # four times the number of the half byte
        first = self.starts[part.bits] + at * (2 * _LANES // 4)
        vectors = [T.bind(self.words[tirx.Ramp(first + half * _LANES, int64(1), _LANES)]) for half in range(2)]
        return list(zip((1, 1 << _LOW), vectors, strict=True))

    def make(self, row: Any) -> None:
        """Fill the tables with the sums of a row."""
        width = self.layout.packed_k
        codes = T.decl_buffer(
            [self.kernel.size(self.gemv.row_count) * width], "int8", data=self.gemv.codes.data, layout=None
        )
        turned = T.decl_buffer([width], "int8", data=self.turned.data, layout=None)
        order = [QUAD * (place % QUAD) + place // QUAD for place in range(TURNED)]
        with self.kernel.serial(width // TURNED) as block:
            at = tirx.Ramp(row * width + block * TURNED, int64(1), TURNED)
            T.buffer_store(turned, tirx.Shuffle([codes[at]], order), [tirx.Ramp(block * TURNED, int64(1), TURNED)])
        with self.kernel.serial(width // TURNED) as block:
            for byte in range(QUAD):
                right = tirx.Broadcast(T.bind(self.turned[block * QUAD + byte]), _LANES)
                for bits, start in self.starts.items():
                    for half in range(bits):
                        zero = tirx.Broadcast(tirx.const(0, "int32"), _LANES)
                        total = T.bind(multiply_quads(zero, _choices(bits, half), right, _LANES))
                        place = 4 * start + ((block * bits + half) * 2 * QUAD + byte) * _ENTRIES
                        self.store(place, total & _same(15))
                        self.store(place + QUAD * _ENTRIES, total >> _same(_LOW))

    def store(self, place: Any, numbers: Any) -> None:
        T.buffer_store(self.bytes, numbers.astype(f"int8x{_ENTRIES}"), [tirx.Ramp(place, int64(1), _ENTRIES)])


def _choices(bits: int, half: int) -> Any:
    """Words whose bytes, one for each of four numbers, are the fields of an index, for all 16; 0 for other numbers."""
    each = _HALF // bits
    words = []
    for index in range(_ENTRIES):
        fields = [index >> bits * number & (1 << bits) - 1 for number in range(each)]
        words.append(sum(field << 8 * (half * each + number) for number, field in enumerate(fields)))
    return tirx.Shuffle([tirx.const(word, "uint32") for word in words], list(range(_ENTRIES)))


def _same(number: int) -> Any:
    return tirx.Broadcast(tirx.const(number, "int32"), _LANES)
