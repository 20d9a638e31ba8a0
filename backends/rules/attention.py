"""Fused attention: softmax(scale Q K^T + mask) V for one (batch, head) a task, float32.

K is transposed and V copied to contiguous scratch once a task, so both products run on unit strides. A tile of 8 query
rows x 2 vectors of keys is 16 accumulators: 2 loads, 8 broadcasts and 16 multiply-adds a step. Scores live in an
[8, keys] buffer that stays in the L1 cache; the exponential is five multiply-adds a vector; rows are normalised after
the second product, on 8 x depth values in place of 8 x keys. Keys are padded to whole tiles with a score of -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations
from graphopt.backends.rules.lanes import fold_lanes, zero_tile
from graphopt.backends.sizes import Size
from graphopt.backends.target import Target
from graphopt.backends.values import View

RULE = "fused-attention"
f32 = approximations.f32
_MASKED = -math.inf
_TILE_VECTORS = 2  # vectors of keys beside each other in a tile


def attention(q: View, k: View, v: View, mask: View | None, scale: float, causal: bool, target: Target) -> Code:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E]; mask broadcasts to [B, H, S, T]. Result [B, S, H, E]."""
    batch, heads, rows, _ = q.shape
    shape = (batch, rows, heads, v.shape[3])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Attention(kernel, q, k, v, mask, scale, causal, outputs[0]).write()

    reads = [q, k, v] + ([] if mask is None else [mask])
    # Both products, then scaling, mask, largest score, distance to it, exponential and sum.
    each = 2 * (int(q.shape[3]) + int(v.shape[3])) + 5 + count_operations(target, _exponential)
    return write_kernel(
        RULE,
        "attention",
        target,
        reads,
        [(shape, "float32")],
        body,
        configuration={
            "rows": _tile_rows(target),
            "columns": _TILE_VECTORS * target.lanes,
            "lanes": target.lanes,
            "mask": "causal" if causal else "none" if mask is None else "shared" if _shares_mask(mask) else "each row",
        },
        flops=batch * heads * _pairs(rows, k.shape[2], causal) * each,
    )


def _exponential(_: Kernel) -> Any:
    return approximations.exp_nonpositive(tirx.Var("score", "float32"))


def _pairs(rows: Size, columns: Size, causal: bool) -> Size:
    """Scores of one head: with a causal mask row r has r + 1 of them, at most all columns."""
    if not causal:
        return rows * columns
    square = rows if rows == columns else sympy.Min(rows, columns)
    triangle = square * (square + 1)
    half = triangle // 2 if isinstance(triangle, int) else FloorDiv(triangle, 2)
    return half if rows == columns else half + (rows - square) * columns


def _tile_rows(target: Target) -> int:
    return 8 if target.registers == 32 else 4


def _shares_mask(mask: View) -> bool:
    """One mask for all rows."""
    return mask.shape[-2] == 1 or mask.strides[-2] == 0


@dataclass(frozen=True)
class _Strides:
    """Where (batch, head, row, 0) lies in a view."""

    flat: Any
    offset: Any
    batch: Any
    head: Any
    row: Any

    def at(self, batch: Any, head: Any, row: Any) -> Any:
        return self.offset + batch * self.batch + head * self.head + row * self.row


def _strides(kernel: Kernel, view: View) -> _Strides:
    batch, head, row = (kernel.size(stride) for stride in view.strides[:3])
    return _Strides(kernel.flat(view.storage), kernel.size(view.offset), batch, head, row)


class _Attention:
    def __init__(
        self, kernel: Kernel, q: View, k: View, v: View, mask: View | None, scale: float, causal: bool, output: Output
    ) -> None:
        self.kernel, self.mask, self.scale, self.causal, self.output = kernel, mask, scale, causal, output
        self.q, self.k, self.v = (_strides(kernel, view) for view in (q, k, v))
        self.lanes = kernel.target.lanes
        self.tile_rows = _tile_rows(kernel.target)
        self.tile_vectors = _TILE_VECTORS
        self.tile_columns = self.tile_vectors * self.lanes
        self.depth, self.value_depth = int(q.shape[3]), int(v.shape[3])
        self.batch, self.heads, self.groups = kernel.size(q.shape[0]), int(q.shape[1]), int(k.shape[1])
        self.rows, self.columns = kernel.size(q.shape[2]), kernel.size(k.shape[2])
        self.column_tiles = tirx.floordiv(self.columns + (self.tile_columns - 1), int64(self.tile_columns))
        self.padded = self.column_tiles * self.tile_columns
        self.value_vectors = -(-self.value_depth // self.lanes)
        self.rows_share_mask = not causal and (mask is None or _shares_mask(mask))

    def write(self) -> None:
        kernel = self.kernel
        with kernel.parallel(self.batch * self.heads) as task:
            batch, head = tirx.truncdiv(task, int64(self.heads)), tirx.truncmod(task, int64(self.heads))
            group = tirx.truncdiv(head, int64(self.heads // self.groups))
            keys = kernel.scratch(self.depth, self.padded)
            values = kernel.scratch(self.padded, self.value_vectors * self.lanes)
            scores = kernel.scratch(self.tile_rows, self.padded)
            bias = kernel.scratch(1 if self.rows_share_mask else self.tile_rows, self.padded)
            self.copy_keys(keys, batch, group)
            self.copy_values(values, batch, group)
            if self.rows_share_mask:
                self.write_bias(bias, 0, batch, head, int64(0))
            row_tiles = tirx.floordiv(self.rows + (self.tile_rows - 1), int64(self.tile_rows))
            with kernel.serial(row_tiles) as row_tile:
                first = row_tile * self.tile_rows
                self.write_rows(keys, values, scores, bias, batch, head, first)

    def copy_keys(self, keys: Any, batch: Any, group: Any) -> None:
        """Transposed; padded columns repeat the last key, and their scores are masked."""
        kernel = self.kernel
        with kernel.serial(self.padded) as column:
            start = self.k.at(batch, group, tirx.min(column, self.columns - 1))
            with kernel.serial(self.depth) as d:
                T.buffer_store(keys, self.k.flat[start + d], [d, column])

    def copy_values(self, values: Any, batch: Any, group: Any) -> None:
        """Padded columns repeat the last value and get weight 0; lanes past the depth are 0."""
        kernel, lanes = self.kernel, self.lanes
        with kernel.serial(self.padded) as column:
            start = self.v.at(batch, group, tirx.min(column, self.columns - 1))
            for c in range(self.value_vectors):
                if (c + 1) * lanes <= self.value_depth:
                    with kernel.vectorized(lanes) as lane:
                        T.buffer_store(values, self.v.flat[start + c * lanes + lane], [column, c * lanes + lane])
                    continue
                for number in range(lanes):
                    at = c * lanes + number
                    value = self.v.flat[start + at] if at < self.value_depth else f32(0)
                    T.buffer_store(values, value, [column, at])

    def write_bias(self, bias: Any, slot: int, batch: Any, head: Any, row: Any) -> None:
        """What is added to the scores of one row: 0 or the mask's number, -inf where masked or padded."""
        kernel, lanes = self.kernel, self.lanes

        def term(column: Any) -> Any:
            value: Any = f32(0)
            if self.mask is not None:
                value = self.mask_term(self.mask, (batch, head, row, column))
            return tirx.Select(column <= row, value, f32(_MASKED)) if self.causal else value

        full = tirx.truncdiv(self.columns, int64(lanes))
        with kernel.serial(full) as step, kernel.vectorized(lanes) as lane:
            T.buffer_store(bias, term(step * lanes + lane), [slot, step * lanes + lane])
        done = full * lanes
        with kernel.serial(self.padded - done) as step:
            column = done + step
            inside = term(tirx.min(column, self.columns - 1))
            T.buffer_store(bias, tirx.Select(column < self.columns, inside, f32(_MASKED)), [slot, column])

    def mask_term(self, mask: View, axes: tuple[Any, ...]) -> Any:
        """What the mask adds to the score at these axes of [B, H, S, T]."""
        skip = len(axes) - len(mask.shape)
        position = self.kernel.size(mask.offset)
        for number, (size, stride) in enumerate(zip(mask.shape, mask.strides, strict=True)):
            if size != 1 and stride != 0:
                position = position + axes[skip + number] * self.kernel.size(stride)
        value = self.kernel.flat(mask.storage)[position]
        return tirx.Select(value, f32(0), f32(_MASKED)) if mask.dtype == "bool" else value.astype("float32")

    def write_rows(self, keys: Any, values: Any, scores: Any, bias: Any, batch: Any, head: Any, first: Any) -> None:
        kernel = self.kernel
        tiles = self.column_tiles
        if self.causal:  # columns right of the last row of the tile have weight 0
            reached = tirx.floordiv(first + (self.tile_rows + self.tile_columns - 1), int64(self.tile_columns))
            tiles = tirx.min(tiles, reached)
        if not self.rows_share_mask:
            for r in range(self.tile_rows):
                self.write_bias(bias, r, batch, head, tirx.min(first + r, self.rows - 1))
        starts = [self.q.at(batch, head, tirx.min(first + r, self.rows - 1)) for r in range(self.tile_rows)]
        with kernel.serial(tiles) as tile:
            self.write_scores(keys, scores, bias, starts, tile * self.tile_columns)
        inverse = kernel.registers(self.tile_rows)
        for r in range(self.tile_rows):
            self.write_softmax(scores, inverse, r, tiles)
        self.write_output(values, scores, inverse, tiles, batch, head, first)

    def write_scores(self, keys: Any, scores: Any, bias: Any, starts: list[Any], first: Any) -> None:
        kernel, lanes = self.kernel, self.lanes
        total = kernel.registers(self.tile_rows, self.tile_vectors, lanes)
        zero_tile(kernel, total, self.tile_rows, self.tile_vectors)
        steps = 4 if self.depth % 4 == 0 else 1
        with kernel.serial(self.depth // steps) as outer:
            for inner in range(steps):
                d = outer * steps + inner
                for r in range(self.tile_rows):
                    for c in range(self.tile_vectors):
                        with kernel.vectorized(lanes) as lane:
                            term = self.q.flat[starts[r] + d] * keys[d, first + c * lanes + lane]
                            T.buffer_store(total, total[r, c, lane] + term, [r, c, lane])
        for r in range(self.tile_rows):
            for c in range(self.tile_vectors):
                with kernel.vectorized(lanes) as lane:
                    column = first + c * lanes + lane
                    added = bias[0 if self.rows_share_mask else r, column]
                    T.buffer_store(scores, total[r, c, lane] * f32(self.scale) + added, [r, column])

    def write_softmax(self, scores: Any, inverse: Any, r: int, tiles: Any) -> None:
        """Weights without their common factor, which `inverse` keeps; a row with nothing to attend to gets 0."""
        kernel, lanes, vectors = self.kernel, self.lanes, self.tile_vectors
        top, total = kernel.registers(vectors, lanes), kernel.registers(vectors, lanes)
        for c in range(vectors):
            with kernel.vectorized(lanes) as lane:
                T.buffer_store(top, f32(_MASKED), [c, lane])
            with kernel.vectorized(lanes) as lane:
                T.buffer_store(total, f32(0), [c, lane])
        with kernel.serial(tiles) as tile:
            for c in range(vectors):
                with kernel.vectorized(lanes) as lane:
                    score = scores[r, tile * self.tile_columns + c * lanes + lane]
                    T.buffer_store(top, tirx.max(top[c, lane], score), [c, lane])
        fold_lanes(kernel, top, vectors, "max")
        shift = kernel.registers(1)
        T.buffer_store(shift, tirx.Select(tirx.EQ(top[0, 0], f32(_MASKED)), f32(0), top[0, 0]), [0])
        with kernel.serial(tiles) as tile:
            for c in range(vectors):
                column = tile * self.tile_columns + c * lanes
                with kernel.vectorized(lanes) as lane:
                    weight = approximations.exp_nonpositive(scores[r, column + lane] - shift[0])
                    T.buffer_store(scores, weight, [r, column + lane])
                with kernel.vectorized(lanes) as lane:
                    T.buffer_store(total, total[c, lane] + scores[r, column + lane], [c, lane])
        fold_lanes(kernel, total, vectors, "sum")
        nothing = tirx.EQ(total[0, 0], f32(0))
        T.buffer_store(inverse, tirx.Select(nothing, f32(0), f32(1) / total[0, 0]), [r])

    def write_output(
        self, values: Any, scores: Any, inverse: Any, tiles: Any, batch: Any, head: Any, first: Any
    ) -> None:
        kernel, lanes = self.kernel, self.lanes
        for begin in range(0, self.value_vectors, 2):  # two vectors of depth at a time: 16 accumulators
            width = min(2, self.value_vectors - begin)
            context = kernel.registers(self.tile_rows, width, lanes)
            zero_tile(kernel, context, self.tile_rows, width)
            with kernel.serial(tiles * (self.tile_columns // 4)) as outer:
                for inner in range(4):
                    column = outer * 4 + inner
                    for r in range(self.tile_rows):
                        for c in range(width):
                            with kernel.vectorized(lanes) as lane:
                                term = scores[r, column] * values[column, (begin + c) * lanes + lane]
                                T.buffer_store(context, context[r, c, lane] + term, [r, c, lane])
            for r in range(self.tile_rows):
                with T.If(first + r < self.rows), T.Then():
                    start = ((batch * self.rows + first + r) * self.heads + head) * self.value_depth
                    for c in range(width):
                        self.store_context(context, inverse, r, c, start, begin + c)

    def store_context(self, context: Any, inverse: Any, r: int, c: int, start: Any, vector: int) -> None:
        kernel, lanes = self.kernel, self.lanes
        if (vector + 1) * lanes <= self.value_depth:
            with kernel.vectorized(lanes) as lane:
                self.output.store(start + vector * lanes + lane, context[r, c, lane] * inverse[r])
            return
        for lane_number in range(self.value_depth - vector * lanes):
            self.output.store(start + vector * lanes + lane_number, context[r, c, lane_number] * inverse[r])
