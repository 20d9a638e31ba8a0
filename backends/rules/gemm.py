"""Packed-weight matrix product with its epilogue in registers: rows x K times [N / 48, K, 48].

A tile of 8 rows x 48 columns is 24 accumulators of 16 lanes (AVX2: 4 x 24, 12 of 8). One step of k costs 3 weight
loads, 8 broadcasts and 24 multiply-adds, so the multiply-adds bound it. Weights stream once per group of rows: each
step of k prefetches its share of the next panel's cache lines, which hides memory latency where weights are cold.
From 64 rows on each thread keeps the same rows in every kernel, so activations stay in its own L2; below, and for
weights larger than a cache, panels are shared out, so weights are read once. Rows are taken in blocks of 128, which
stay in the L2 cache while all panels pass. Row tails re-read the last row and store nothing, so a symbolic row count
costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.register_tile import RegisterTile, Tile
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

RULE = "packed-gemm"
_ROWS_KEPT_FROM = 64  # rows from which each thread keeps its own
_WEIGHT_STREAMED_FROM = (
    16 << 20
)  # bytes from which a weight comes from memory, so that only one thread may read each part
_BLOCK_ROWS = 128  # rows that all panels pass over before the next rows; also what prefetching expects
_LINE = 16  # float32 values of a cache line


def tile_for(target: Target) -> Tile:
    """24 of 32 registers as accumulators with AVX-512 and NEON, 12 of 16 with AVX2."""
    return Tile(8 if target.registers == 32 else 4, 3)


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


def gemm(a: View, weight: View, result: Product, end: Any, name: str, target: Target) -> Code:
    """C[row, n] = sum over k of A[row, k] B[k, n], then the element-wise tree `end` over `result`.

    float32; `a` [..., K] is contiguous, `weight` is packed as `pack_weight` does.
    """
    reads, tile = [a, weight, end], tile_for(target)
    steps = product(result.shape) * a.shape[-1]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gemm(kernel, a, weight, result, end, outputs[0], tile).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        reads,
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": tile.rows,
            "columns": tile.vectors * target.lanes,
            "steps": tile.steps,
            "lanes": target.lanes,
            "block_rows": _BLOCK_ROWS,
            "shares": target.threads,
            "split": _split(weight, result),
        },
        flops=2 * steps + operations([end], target),
    )


def _split(weight: View, result: Product) -> str:
    """What is shared out between threads: rows, or panels of the weight, so that each part of it is read once."""
    rows = product(result.shape[:-1])
    if _is_streamed(weight) or (isinstance(rows, int) and rows < _ROWS_KEPT_FROM):
        return "panels"
    return "rows" if isinstance(rows, int) else f"rows from {_ROWS_KEPT_FROM}"


def _is_streamed(weight: View) -> bool:
    return int(product(weight.shape)) * 4 >= _WEIGHT_STREAMED_FROM


class _Gemm:
    def __init__(
        self, kernel: Kernel, a: View, weight: View, result: Product, end: Any, output: Output, tile: Tile
    ) -> None:
        self.kernel, self.tile, self.output, self.end, self.result = kernel, tile, output, end, result
        self.a, self.b = kernel.flat(a.storage), kernel.flat(weight.storage)
        self.panels, self.k, _ = (int(size) for size in weight.shape)
        self.streamed = _is_streamed(weight)
        self.n = int(result.shape[-1])
        self.lanes = kernel.target.lanes
        self.columns = tile.vectors * self.lanes
        self.row_count = product(result.shape[:-1])
        self.rows = kernel.size(self.row_count)

    def write(self) -> None:
        kernel, tile = self.kernel, self.tile
        tiles = tirx.floordiv(self.rows + (tile.rows - 1), int64(tile.rows))
        threads = kernel.target.threads
        row_groups = tirx.Select(tiles >= _ROWS_KEPT_FROM // tile.rows, int64(threads), int64(1))
        if self.streamed:
            row_groups = int64(1)
        tiles_each = tirx.floordiv(tiles + row_groups - 1, row_groups)
        panels_each = -(-self.panels // threads)
        with kernel.parallel(row_groups * threads) as task:
            first_tile = tirx.truncdiv(task, int64(threads)) * tiles_each
            first_panel = tirx.truncmod(task, int64(threads)) * panels_each
            own_tiles = tirx.min(tiles_each, tiles - first_tile)
            own_panels = tirx.min(int64(panels_each), self.panels - first_panel)
            block = _BLOCK_ROWS // tile.rows
            with (
                kernel.serial(tirx.floordiv(own_tiles + (block - 1), int64(block))) as at,
                kernel.serial(own_panels) as panel,
                kernel.serial(tirx.min(int64(block), own_tiles - at * block)) as tile_of_block,
            ):
                self.write_tile(first_panel + panel, first_tile + at * block + tile_of_block, tile_of_block)

    def write_tile(self, panel: Any, tile_number: Any, tile_of_block: Any) -> None:
        kernel, tile, columns = self.kernel, self.tile, self.columns
        first_row = tile_number * tile.rows
        starts = [T.bind(tirx.min(first_row + r, self.rows - 1) * self.k) for r in range(tile.rows)]
        weights = panel * (self.k * columns)
        registers = RegisterTile(kernel, tile)
        registers.zero()
        registers.multiply(
            self.k,
            lambda r, k: self.a[starts[r] + k],
            lambda k, c, lane: self.b[weights + k * columns + c * self.lanes + lane],
            lambda outer: self.prefetch(weights, tile_of_block * (self.k // tile.steps) + outer, self.k // tile.steps),
        )
        registers.write(
            self.result,
            self.end,
            self.output,
            rows=self.rows - first_row,
            position=lambda r: first_row + r,
            first=panel * columns,
            width=self.n,
        )

    def prefetch(self, weights: Any, step: Any, steps: int) -> None:
        """Touch this step's share of the next panel's lines."""
        lines = -(-self.k * self.columns // _LINE)
        rows = min(self.row_count, _BLOCK_ROWS) if isinstance(self.row_count, int) else _BLOCK_ROWS
        tiles = max(1, -(-rows // self.tile.rows) // (self.kernel.target.threads if rows >= _ROWS_KEPT_FROM else 1))
        share = -(-lines // (tiles * steps))
        for line in range(share):
            position = weights + (lines + step * share + line) * _LINE
            address = tirx.address_of(self.b[position])
            T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))
