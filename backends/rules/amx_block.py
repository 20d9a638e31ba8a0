"""A block of sums on AMX tiles: up to two tiles of rows times two of columns, as products and convolutions share it.

A step of 32 bfloat16 or 64 codes of the depth loads a tile of each row of the block from where its numbers lie and two
of the weight, packed by `pack_tiles`, for up to four multiplications. The sums are then stored on the stack, 4 KB, and
the element-wise tree runs over them row by row after the tiles of the next block have been started: it hides the
latencies of theirs, and behind deep sums it costs nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.rules.register_tile import RegisterTile, Tile

PANEL = 2 * amx.COLUMNS  # columns of a block
ROWS = 2 * amx.ROWS  # of a block that is two tiles high
STEP = 2 * amx.ROWS * amx.ROW_BYTES  # bytes of a weight in one step
LINE = 64  # bytes of a cache line
LINES = STEP // LINE  # of the weight in one step
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers
_STEP_CYCLES, _WRITTEN = 70, 400  # of a step of 32 x 32 sums, and of writing them
_READ = 8  # bytes a cycle that a weight is read with from beyond the L2 cache


def cycles(blocks: int, panels: int, steps: int) -> float:
    """What so many blocks of so many panels take a thread, which reads their weights once."""
    return max(blocks * panels * max(steps * _STEP_CYCLES, _WRITTEN), panels * steps * STEP / _READ)


def pack_tiles(weight: np.ndarray) -> np.ndarray:
    """[N, K] -> [ceil(N / 32), ceil(K / 32), 2, 16, 32]: a tile's row holds a pair of the depth for 16 columns.

    Codes are packed [ceil(N / 32), ceil(K / 64), 2, 16, 64] with fours. Zero where N or K ends.
    """
    n, k = weight.shape
    wide = amx.ROW_BYTES // weight.itemsize  # numbers of a row
    padded = np.pad(weight, ((0, -n % PANEL), (0, -k % wide)))
    tiles = padded.reshape(-1, 2, amx.COLUMNS, padded.shape[1] // wide, amx.ROWS, wide // amx.ROWS)
    packed = tiles.transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(packed).reshape(*packed.shape[:4], wide)


class StoredRows(RegisterTile):
    """Sums in memory, whose rows have numbers; those written are from `begin` on."""

    begin: Any = 0

    def zero_rows(self) -> None:
        with self.kernel.serial(self.tile.rows) as row:
            for c in range(self.tile.vectors):
                with self.kernel.vectorized(self.lanes) as lane:
                    T.buffer_store(self.values, tirx.const(0, self.dtype), [row, c, lane])

    def each_row(self, rows: Any, write: Callable[[Any], None]) -> None:
        with self.kernel.serial(rows) as row:
            write(T.bind(self.begin + row))


class StoredSums(StoredRows):
    """Those of two blocks of `height` tiles of rows."""

    def __init__(self, kernel: Kernel, height: int, numbers: amx.Numbers) -> None:
        super().__init__(kernel, Tile(2 * height * amx.ROWS, 2), numbers.sums)

    def store(self, firsts: list[Any]) -> None:
        """The sums of the tiles, each of which begins at a row."""
        for tile, first in enumerate(firsts):
            for c in range(2):
                amx.store(_SUMS[2 * tile + c], tirx.address_of(self.values[first, c, 0]), int64(4 * PANEL))


def overlapped(
    kernel: Kernel, height: int, count: Any, multiply: Callable[[Any, Any], None], finish: Callable[[Any, Any], None]
) -> None:
    """`finish` each of `count` blocks after `multiply` of the next; both take its number and its first row of sums."""
    with kernel.serial(count + 1) as number:

        def row(block: Any) -> Any:
            return T.bind(tirx.truncmod(block, int64(2)) * (height * amx.ROWS))

        with T.If(number < count), T.Then():
            multiply(number, row(number))
        with T.If(number > 0), T.Then():
            before = T.bind(number - 1)
            finish(before, row(before))


def configure(kernel: Kernel, height: int, rows: Any) -> None:
    """All tiles 64 bytes wide; those of sums and of the left side `rows` high."""
    memory = kernel.registers(amx.CONFIGURATION_BYTES, dtype="uint8")
    high = (*_SUMS[: 2 * height], *_LEFT[:height])
    amx.write_configuration(memory, {**dict.fromkeys(high, rows), **dict.fromkeys(_RIGHT, amx.ROWS)})
    amx.configure(tirx.address_of(memory[0]))


def zero(height: int) -> None:
    for tile in _SUMS[: 2 * height]:
        amx.zero(tile)


def multiply(numbers: amx.Numbers, left: list[Any], stride: Any, weight: Any, start: Any) -> None:
    """One step of the depth: `left` are addresses of tiles, `weight` a buffer of numbers with the step at `start`."""
    both = len(left) == 2
    amx.load(_LEFT[0], left[0], stride)
    for c, tile in enumerate(_RIGHT):
        amx.load(tile, tirx.address_of(weight[start + c * amx.ROWS * numbers.depth]), int64(amx.ROW_BYTES))
    amx.multiply(numbers, _SUMS[0], _LEFT[0], _RIGHT[0])
    if both:
        amx.load(_LEFT[1], left[1], stride)
    amx.multiply(numbers, _SUMS[1], _LEFT[0], _RIGHT[1])
    if both:
        amx.multiply(numbers, _SUMS[2], _LEFT[1], _RIGHT[0])
        amx.multiply(numbers, _SUMS[3], _LEFT[1], _RIGHT[1])


def prefetch(kernel: Kernel, numbers: amx.Numbers, weight: Any, start: Any, first: Any, share: Any) -> None:
    """Touch `share` lines from the line `first` on, counted from the number `start` of the weight."""
    line_of = LINE // numbers.bytes  # numbers
    with kernel.serial(share) as line:
        address = tirx.address_of(weight[start + (first + line) * line_of])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))
