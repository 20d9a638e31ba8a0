"""Packed-weight matrix product with its epilogue in registers: rows x K times [N / columns, K, columns].

A register tile of about 24 accumulators runs down one panel of the weight; a step of k costs 3 weight loads, 8
broadcasts and 24 multiply-adds (8 x 48, AVX-512), so the multiply-adds bound it. All tiles of a block of rows pass over
a panel while it lies in the L2 cache, and each step prefetches its share of the next panel's lines, which hides memory
latency where weights are cold. A panel deeper than the cache's share is taken in parts, its sums kept in between. Row
tails re-read the last row and store nothing, so a row count known at run time costs nothing.

Where one tile holds all rows, as in decoding, weights are read once and memory bounds the product: panels lie one after
the other, so each step prefetches lines a fixed distance ahead, and neither the first panel of a share waits nor is one
behind the last fetched for nothing.

bfloat16 times bfloat16, where the target multiplies pairs, is the same product with pairs of k in the place of k: a
pair is one 32-bit word of A, and of a weight packed [N / columns, K / 2, columns, 2]. Sums are float32.

Threads share out rows, so that activations stay in their own L2 cache, or panels, so that weights are read once:
whatever gives the more even shares. Sums always run over k from first to last, so results depend on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.choice import UNUSUAL, Choice, epilogue_parameters, size_parameter
from graphopt.backends.instructions import as_pair
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.register_tile import PairTile, RegisterTile, Tile, tile_cost, tiles
from graphopt.backends.sizes import Size, least, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "packed-gemm"
_ROWS_KEPT_FROM = 64  # rows from which each thread keeps its own
_ROWS_AWAY = 1.04  # how much longer a product takes whose rows lie in the L2 cache of another core
_WEIGHT_STREAMED_FROM = 16 << 20  # bytes from which a weight comes from memory, so that one thread may read each part
_PANEL_BYTES = 320 << 10  # of a panel that shares a common L2 cache with the next one
_BLOCK_BYTES = 512 << 10  # of the rows that all panels pass over before the next ones
_MOST_BLOCK_ROWS = 256
_MANY_ROWS = 840  # what choosing a tile takes such a row count for: a multiple of most tiles' rows
_TYPICAL_ROWS = 128  # which a tile has to divide well where the row count is known at run time
_SERIAL_BELOW = 1 << 18  # multiply-adds that are not worth the launch of threads
_SERIAL_POSSIBLE_BELOW = 8 * _SERIAL_BELOW  # those that may be: of more, only a machine that others use says so
_FEW_ROWS = (1, 4)  # up to which a row count known at run time is one tile of so many rows
_AHEAD = 4 << 10  # bytes ahead, at the least, of a weight that is read once: faster than 16 KB, and than a whole panel
_GROUPS_AHEAD = 4  # of steps, where they are more: panels of 96 columns are read 1.4 times as fast as by 4 KB
_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    tile: Tile
    block_rows: int  # rows that all panels pass over before the next ones, a multiple of the tile's
    block_depth: int  # k of a panel that all tiles of a block pass over before the next
    row_shares: int  # shares of the rows between threads
    panel_shares: int  # shares of the panels between threads


@cache
def configure(
    target: Target, rows: Size, n: int, k: int, temporaries: int = 0, packed: tuple[int, ...] = ()
) -> Configuration:
    """The default for rows x K times K x N: the tile and shares with the least time of the longest share.

    `packed` are the columns of a panel that the weight is packed in already, of which one is taken where it can be.
    """
    shares = _shares(target, rows, n, k)
    found = list(candidates(target, rows, n, k, shares, temporaries=temporaries))
    fitting = [choice for choice in found if choice.tile.vectors * target.lanes in packed]
    return min(fitting or found, key=lambda choice: cost(target, choice, rows, n, k))


def candidates(
    target: Target,
    rows: Size,
    n: int,
    k: int,
    shares: Sequence[tuple[int, int]],
    scale: float = 1,
    temporaries: int = 0,
) -> Iterator[Configuration]:
    """Every tile with each of the shares; blocks and parts of panels are `scale` times what the caches suggest."""
    for tile in tiles(target, True, temporaries):
        depth = _part(k, max(1, int(scale * _PANEL_BYTES) // (4 * tile.vectors * target.lanes)), tile.steps)
        for row_shares, panel_shares in shares:
            share = -(-rows // row_shares) if isinstance(rows, int) else _MOST_BLOCK_ROWS
            most = int(scale * min(_MOST_BLOCK_ROWS, max(_ROWS_KEPT_FROM, _BLOCK_BYTES // (4 * k))))
            yield Configuration(tile, _part(share, most, tile.rows), depth, row_shares, panel_shares)


def worth_timing(target: Target, rows: Size, n: int, k: int, temporaries: int = 0) -> list[Configuration]:
    """Candidates with blocks and parts of panels of three sizes, the least expected time first."""
    serial = [(1, 1)] if isinstance(rows, int) and rows * n * k < _SERIAL_POSSIBLE_BELOW else []
    shares = list(dict.fromkeys([*_shares(target, rows, n, k), *_every_share(target, rows), *serial]))
    costs: dict[Configuration, float] = {}
    for scale, doubt in ((1, 1.0), (0.5, UNUSUAL), (2, UNUSUAL)):
        for choice in candidates(target, rows, n, k, shares, scale, temporaries):
            costs.setdefault(choice, doubt * cost(target, choice, rows, n, k))
    return sorted(costs, key=lambda choice: costs[choice])


def offer(
    target: Target,
    a: View,
    n: int,
    dtype: str,
    end: Any,
    write: Callable[[Configuration], Code],
    packed: tuple[int, ...] = (),
) -> Choice[Configuration]:
    """What may be chosen for a [..., K] times a weight [N, K] of this dtype, followed by the tree `end`.

    bfloat16 numbers are multiplied in pairs, half as many steps of k. `packed` as in `configure`; then there is no
    other choice of columns.
    """
    rows, pairs = product(a.shape[:-1]), a.dtype == BFLOAT16
    k = int(a.shape[-1]) // 2 if pairs else int(a.shape[-1])
    parameters = {"rows": size_parameter(rows), "n": n, "k": k, "dtype": dtype, "contiguous": a.contiguous}
    parameters |= {"pairs": True} if pairs else {}
    default = configure(target, rows, n, k, packed=packed)

    def others() -> list[Configuration]:
        found = worth_timing(target, rows, n, k)
        return [choice for choice in found if choice.tile.vectors == default.tile.vectors] if packed else found

    return Choice(Workload.of(RULE, {**parameters, **epilogue_parameters(end)}), default, others, write)


def _part(whole: int, most: int, unit: int) -> int:
    """The length of equal parts of at most about `most`, in whole units."""
    parts = -(-whole // most)
    return -(-whole // (parts * unit)) * unit


def _shares(target: Target, rows: Size, n: int, k: int) -> list[tuple[int, int]]:
    """(shares of rows, shares of panels), those that keep rows on their thread first."""
    threads = target.threads
    if not isinstance(rows, int):
        return [(1 if _is_streamed(n, k) else threads, threads)]
    if rows * n * k < _SERIAL_BELOW:
        return [(1, 1)]
    if _is_streamed(n, k) or rows < _ROWS_KEPT_FROM:
        return [(1, threads)]
    return _every_share(target, rows)


def _every_share(target: Target, rows: Size) -> list[tuple[int, int]]:
    threads = target.threads
    if not isinstance(rows, int):
        return [(threads, threads), (1, threads)]
    return [(threads // panels, panels) for panels in range(1, threads + 1) if threads % panels == 0]


def cost(target: Target, choice: Configuration, rows: Size, n: int, k: int) -> float:
    """Time of the longest share; rows known at run time are as often many as they are few."""
    tile, columns = choice.tile, choice.tile.vectors * target.lanes
    if not isinstance(rows, int):
        share = -(-_TYPICAL_ROWS // choice.row_shares)
        few = tile_cost(target, tile, share, n, k) * _MANY_ROWS / share
        return few + tile_cost(target, tile, _MANY_ROWS, n, k)
    tiles_, panels = -(-rows // tile.rows), -(-n // columns)
    away = 1 if choice.panel_shares == 1 else _ROWS_AWAY
    own_rows, own_panels = -(-tiles_ // choice.row_shares), -(-panels // choice.panel_shares)
    return away * tile_cost(target, tile, own_rows * tile.rows, own_panels * columns, k)


def _is_streamed(n: int, k: int) -> bool:
    return 4 * n * k >= _WEIGHT_STREAMED_FROM


def pack_weight(weight: np.ndarray, columns: int) -> np.ndarray:
    """[N, K] -> [ceil(N / columns), K, columns], zero where N ends; float32."""
    n, k = weight.shape
    panels = -(-n // columns)
    packed = np.zeros((panels, k, columns), weight.dtype)
    full = n // columns
    packed[:full] = weight[: full * columns].reshape(full, columns, k).transpose(0, 2, 1)
    if full < panels:
        packed[full, :, : n - full * columns] = weight[full * columns :].T
    return packed


def pack_pairs(weight: np.ndarray, columns: int) -> np.ndarray:
    """[N, K] -> [ceil(N / columns), ceil(K / 2), columns, 2], zero where N or K ends."""
    even = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2)))
    pairs = pack_weight(np.ascontiguousarray(even).view(np.uint32), columns)
    return pairs.view(weight.dtype).reshape(*pairs.shape, 2)


def gemm(
    a: View, weight: View, result: Product, end: Any, name: str, target: Target, choice: Configuration | None = None
) -> Code:
    """C[row, n] = sum over k of A[row, k] B[k, n], then the element-wise tree `end` over `result`.

    float32, `weight` also float16 or bfloat16; `a` [..., K] has its last axis contiguous, `weight` is packed as
    `pack_weight` does for the columns of the tile of `choice`, by default what `configure` says. Where `a` is bfloat16
    the weight is packed by `pack_pairs` and the configuration is one for K / 2.
    """
    rows, n, k = product(result.shape[:-1]), int(result.shape[-1]), int(a.shape[-1])
    choice = configure(target, rows, n, int(weight.shape[1])) if choice is None else choice

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        GemmWriter(kernel, a, weight, result, end, outputs[0], choice).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [a, weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "steps": choice.tile.steps,
            "lanes": target.lanes,
            **({"products": "pairs of bfloat16"} if a.dtype == BFLOAT16 else {}),
            "block_rows": choice.block_rows,
            "block_depth": choice.block_depth,
            "row_shares": choice.row_shares,
            "panel_shares": choice.panel_shares,
        },
        flops=2 * rows * n * k + operations([end], target),
    )


class GemmWriter:
    def __init__(
        self, kernel: Kernel, a: View, weight: View, result: Product, end: Any, output: Output, choice: Configuration
    ) -> None:
        self.kernel, self.choice, self.tile = kernel, choice, choice.tile
        self.output, self.end, self.result = output, end, result
        self.pairs = a.dtype == BFLOAT16
        self.view = a
        self.a = kernel.words(a.storage, "uint16") if self.pairs else kernel.flat(a.storage)
        self.b = kernel.words(weight.storage, "uint32") if self.pairs else kernel.flat(weight.storage)
        self.panels, self.k, self.columns = (int(size) for size in weight.shape[:3])  # k counts pairs where there are
        self.width = np.dtype(self.b.dtype).itemsize  # bytes of a weight, or of a pair of them
        self.line = _LINE // self.width
        self.n, self.lanes = int(result.shape[-1]), kernel.target.lanes
        self.row_count = product(result.shape[:-1])
        self.rows = kernel.size(self.row_count)
        self.whole = isinstance(self.row_count, int) and self.row_count % self.tile.rows == 0  # no tile has rows less

    # Shares -----------------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """Tasks are shares of rows x shares of panels. Few rows known at run time are one share of one tile."""
        if isinstance(self.row_count, int):
            self.write_shares(self.tile, int64(self.choice.row_shares))
        else:
            # A branch that no row count takes would hold sizes below one, and TVM finds divisions by zero there.
            fewest = least(self.row_count)
            self.write_rows([rows for rows in _FEW_ROWS if fewest <= rows < self.tile.rows])

    def write_rows(self, few: list[int]) -> None:
        """A row count known at run time: the first of the tiles of `few` rows that holds all, else the whole tile."""
        if not few:
            kept = tirx.Select(self.rows >= _ROWS_KEPT_FROM, int64(self.choice.row_shares), int64(1))
            self.write_shares(self.tile, kept)
            return
        with T.If(self.rows > few[0]):
            with T.Then():
                self.write_rows(few[1:])
            with T.Else():
                self.write_shares(replace(self.tile, rows=few[0]), int64(1))

    def write_shares(self, tile: Tile, row_shares: Any) -> None:
        kernel, panel_shares = self.kernel, self.choice.panel_shares
        tiles_ = tirx.floordiv(self.rows + (tile.rows - 1), int64(tile.rows))
        alone = isinstance(self.row_count, int) and self.choice.row_shares * panel_shares == 1
        with (kernel.serial if alone else kernel.parallel)(row_shares * panel_shares) as task:
            row_share = tirx.truncdiv(task, int64(panel_shares))
            panel_share = tirx.truncmod(task, int64(panel_shares))
            first = T.bind(tirx.truncdiv(row_share * tiles_, row_shares))
            own = T.bind(tirx.truncdiv((row_share + 1) * tiles_, row_shares) - first)
            first_panel = T.bind(tirx.truncdiv(panel_share * self.panels, int64(panel_shares)))
            panels = tirx.truncdiv((panel_share + 1) * self.panels, int64(panel_shares)) - first_panel
            block = max(1, self.choice.block_rows // tile.rows)
            parts = -(-self.k // self.choice.block_depth)
            memory = block * tile.rows * self.columns
            sums = kernel.scratch(memory, dtype=self.result.dtype) if parts > 1 else None
            with (
                kernel.serial(tirx.truncdiv(own + (block - 1), int64(block))) as at,
                kernel.serial(panels) as panel,
                kernel.serial(parts) as part,
                kernel.serial(tirx.min(int64(block), own - at * block)) as number,
            ):
                passing = self.tiles_passing(tile, tirx.min(int64(block), own - at * block))
                _Step(self, tile, sums, first_panel + panel, part, first + at * block + number, number, passing).write()

    def tiles_passing(self, tile: Tile, count: Any) -> Any:
        """Tiles that pass over a part of a panel: a number where it is known, else `count` of them."""
        if tile != self.tile:
            return 1
        if not isinstance(self.row_count, int):
            return count
        return max(1, -(-min(-(-self.row_count // self.choice.row_shares), self.choice.block_rows) // tile.rows))

    def row_start(self, row: Any) -> Any:
        """Where a row of A lies; past the last one it is read again."""
        kernel, view = self.kernel, self.view
        row = row if self.whole else tirx.min(row, self.rows - 1)
        if view.contiguous:
            return row * int(view.shape[-1])
        index = kernel.index(view.shape, row=row, column=int64(0))
        start = kernel.size(view.offset)
        for number, stride in enumerate(view.strides[:-1]):
            if view.shape[number] != 1 and stride != 0:
                start = start + index.axis(number) * kernel.size(stride)
        return start

    def registers(self, tile: Tile) -> RegisterTile:
        return (PairTile if self.pairs else RegisterTile)(self.kernel, tile)

    def left(self, start: Any, k: Any) -> Any:
        if self.pairs:
            return as_pair(self.a[start + 2 * k], self.a[start + 2 * k + 1])
        return self.a[start + k]

    def right(self, start: Any, lane: Any) -> Any:
        """The weight at a lane of the vector from `start` on; a vector of pairs at the range of all lanes."""
        return self.b[lane + start] if self.pairs else self.b[start + lane].astype("float32")


class _Step:
    """One tile over one part of a panel."""

    def __init__(
        self,
        gemm_: GemmWriter,
        tile: Tile,
        sums: Any,
        panel: Any,
        part: Any,
        tile_number: Any,
        number: Any,
        passing: Any,
    ) -> None:
        self.gemm, self.kernel, self.tile, self.sums = gemm_, gemm_.kernel, tile, sums
        self.panel, self.part, self.number = T.bind(panel), part, number
        self.first_row = T.bind(tile_number * tile.rows)
        self.depth = gemm_.choice.block_depth
        self.parts = -(-gemm_.k // self.depth)
        self.passing = passing
        depth = min(self.depth, gemm_.k)
        self.steps = max(1, depth // tile.steps)
        self.lines = -(-depth * gemm_.columns // gemm_.line)  # of the next part of a panel
        passes = passing * self.steps  # fetch them between them
        known = isinstance(passes, int)
        self.share = -(-self.lines // passes) if known else T.bind(tirx.truncdiv(passes + (self.lines - 1), passes))

    def write(self) -> None:
        gemm_ = self.gemm
        registers = gemm_.registers(self.tile)
        if self.sums is None:
            registers.zero()
        else:
            with T.If(self.part == 0):
                with T.Then():
                    registers.zero()
                with T.Else():
                    registers.read(self.sums, self.number * (self.tile.rows * gemm_.columns))
        registers.prefetch(gemm_.end, gemm_.output, lambda r: self.first_row + r, self.panel * gemm_.columns)
        self.multiply(registers)
        if self.sums is None:
            self.write_end(registers)
            return
        with T.If(self.part == self.parts - 1):
            with T.Then():
                self.write_end(registers)
            with T.Else():
                registers.keep(self.sums, self.number * (self.tile.rows * gemm_.columns))

    def multiply(self, registers: RegisterTile) -> None:
        gemm_, depth = self.gemm, self.depth
        skip = self.part * depth * (2 if gemm_.pairs else 1)
        starts = [T.bind(gemm_.row_start(self.first_row + r) + skip) for r in range(self.tile.rows)]
        weights = T.bind((self.panel * gemm_.k + self.part * depth) * gemm_.columns)
        even = gemm_.k % depth == 0
        registers.multiply(
            min(depth, gemm_.k) if even else tirx.min(int64(depth), gemm_.k - self.part * depth),
            lambda r, k: gemm_.left(starts[r], k),
            lambda k, c, lane: gemm_.right(weights + k * gemm_.columns + c * gemm_.lanes, lane),
            lambda outer: self.prefetch(weights, outer),
        )

    def prefetch(self, weights: Any, outer: Any) -> None:
        """Touch this step's share of the lines of the next part of a panel, or of those a little ahead."""
        gemm_, line = self.gemm, self.gemm.line
        if isinstance(self.passing, int) and self.passing == 1:
            step = self.tile.steps * gemm_.columns
            ahead = max(_AHEAD // gemm_.width, _GROUPS_AHEAD * step)
            self.touch(weights + ahead + outer * step, -(-step // line))
            return
        lines, share = self.lines, self.share
        self.touch(weights + (lines + (self.number * self.steps + outer) * share) * line, share)

    def touch(self, position: Any, lines: Any) -> None:
        if not isinstance(lines, int):
            with self.kernel.serial(lines) as line:
                self.fetch(position + line * self.gemm.line)
            return
        for line in range(lines):
            self.fetch(position + line * self.gemm.line)

    def fetch(self, position: Any) -> None:
        address = tirx.address_of(self.gemm.b[position])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))

    def write_end(self, registers: RegisterTile) -> None:
        gemm_ = self.gemm
        registers.write(
            gemm_.result,
            gemm_.end,
            gemm_.output,
            rows=self.tile.rows if gemm_.whole else T.bind(gemm_.rows - self.first_row),
            position=lambda r: self.first_row + r,
            first=T.bind(self.panel * gemm_.columns),
            width=gemm_.n,
        )
