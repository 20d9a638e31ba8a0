"""Fused attention: softmax(scale Q K^T + mask) V, without ever storing the scores.

All numbers are float32; where queries, keys and values are bfloat16 both products multiply pairs of them.

A task is one group of heads that share keys (and, where there are few, a part of their rows). Keys come in blocks that
stay in the L2 cache: transposed by shuffles into panels of 2 vectors and read by all rows of all heads of the group.
A tile of 8 query rows x 2 vectors is 16 accumulators: 2 loads, 8 broadcasts and 16 multiply-adds a step, in both
products. Its scores, 8 x 256, stay in L1. The exponential has base 2, its factor is folded into the scale: 13
instructions a vector. With more than one block the largest score and the sum of weights are carried from block to block
(Milakov and Gimelshein, 2018; Dao et al., 2022) and the unfinished rows lie in the output. What follows element by
element is computed on each tile of finished rows. One query row alone is left to the rule for single rows, which reads
keys and values once, as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations, operations
from graphopt.backends.rules.attention_choice import RULE, Configuration, is_one_block
from graphopt.backends.rules.attention_copies import Memory, Operands, ceiling
from graphopt.backends.rules.attention_epilogue import Epilogue
from graphopt.backends.rules.attention_operands import MASKED, Masks
from graphopt.backends.rules.attention_pairs import add_products, rounded_words, word_at
from graphopt.backends.rules.attention_row import write_single_rows
from graphopt.backends.rules.lanes import fill_tile, settled, span, store_folded, zero_tile
from graphopt.backends.sizes import Size, least
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

f32 = approximations.f32
_LEAST_ROWS = 64  # of a task, where heads are too few: below, copying the keys again costs more than it brings
_STEPS = 4  # keys of the second product written out
_LOG2_E = 1 / math.log(2)


def attention(
    q: View,
    k: View,
    v: View,
    mask: View | None,
    scale: float,
    causal: bool,
    result: Product,
    end: Any,
    target: Target,
    choice: Configuration,
) -> Code:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E]; mask broadcasts to [B, H, S, T].

    float32, or all three bfloat16 with an even D. Stored is the element-wise tree `end` over `result`, which has the
    elements of [B, S, H, E] in this order: float32, or rounded to bfloat16 where the keys are one block at most.
    """
    batch, heads, rows, _ = q.shape
    shape = (batch, rows, heads, v.shape[3])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        masks = Masks(mask, causal)
        epilogue = Epilogue(kernel, shape, result, end, outputs[0])
        single = int(q.shape[3]) % target.lanes == 0 and int(v.shape[3]) % target.lanes == 0
        if single and rows == 1:
            write_single_rows(kernel, q, k, v, masks, scale, epilogue)
        elif single and not isinstance(rows, int) and least(rows) == 1:
            with T.If(kernel.size(rows) == 1):
                with T.Then():
                    write_single_rows(kernel, q, k, v, masks, scale, epilogue)
                with T.Else():
                    _Attention(kernel, q, k, v, masks, scale, epilogue, choice).write()
        else:
            _Attention(kernel, q, k, v, masks, scale, epilogue, choice).write()

    reads = [q, k, v, *([] if mask is None else [mask]), end]
    # Both products, then scaling, mask, largest score, distance to it, exponential and sum.
    each = 2 * (int(q.shape[3]) + int(v.shape[3])) + 5 + count_operations(target, _exponential)
    return write_kernel(
        RULE,
        fused_name("attention", end),
        target,
        reads,
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": 1 if rows == 1 else choice.rows,
            "columns": choice.vectors * target.lanes,
            "block": choice.block,
            "lanes": target.lanes,
            **({"products": "pairs of bfloat16"} if q.dtype == BFLOAT16 else {}),
            "mask": "causal" if causal else "none" if mask is None else "given",
        },
        flops=batch * heads * _pairs(rows, k.shape[2], causal) * each + operations([end], target),
    )


def _exponential(_: Kernel) -> Any:
    return approximations.exp2_nonpositive(tirx.Var("score", "float32"))[0]


def _pairs(rows: Size, columns: Size, causal: bool) -> Size:
    """Scores of one head: with a causal mask row r has r + 1 of them, at most all columns."""
    if not causal:
        return rows * columns
    square = rows if rows == columns else sympy.Min(rows, columns)
    triangle = square * (square + 1)
    half = triangle // 2 if isinstance(triangle, int) else FloorDiv(triangle, 2)
    return half if rows == columns else half + (rows - square) * columns


@dataclass(frozen=True)
class _Rows:
    """One tile of rows against one block of keys; `start` and `count` are the block's, `state` numbers the tile."""

    batch: Any
    group: Any
    head: Any
    first: Any
    start: Any
    count: Any
    state: Any
    memory: Memory


@dataclass(frozen=True)
class _Numbers:
    """One number a row of a tile, each in a small register buffer."""

    shift: Any  # what the exponent is less by
    factor: Any  # what sums and products of the blocks before are multiplied by
    scale: Any  # what the second product is multiplied by


class _Attention(Operands):
    def __init__(
        self,
        kernel: Kernel,
        q: View,
        k: View,
        v: View,
        masks: Masks,
        scale: float,
        epilogue: Epilogue,
        choice: Configuration,
    ) -> None:
        super().__init__(kernel, q, k, v, choice.vectors)
        self.masks, self.scale = masks, scale
        self.epilogue, self.output = epilogue, epilogue.output
        self.tile_rows, self.block = choice.rows, choice.block
        self.folded = 1 << (self.tile_rows - 1).bit_length()  # lanes of a vector with one number a row
        self.batch, self.rows = kernel.size(q.shape[0]), kernel.size(q.shape[2])
        self.one_block = is_one_block(k, choice)
        self.raw = masks.given is None and scale > 0  # scores are kept as they are and scaled in the exponent
        self.padded = -(-k.shape[2] // self.tile_columns) * self.tile_columns if self.one_block else self.block

    # Shares -----------------------------------------------------------------------------------------------------------
    def write(self) -> None:
        kernel, threads = self.kernel, self.kernel.target.threads
        pairs, tiles = self.batch * self.groups, ceiling(self.rows, self.tile_rows)
        parts = T.bind(self.parts(pairs, threads))
        each = T.bind(tirx.truncdiv(tiles + parts - 1, parts))
        with kernel.parallel(pairs * parts) as task:
            pair, part = settled(kernel, tirx.truncdiv(task, parts)), settled(kernel, tirx.truncmod(task, parts))
            if self.masks.causal:  # late rows have more keys: a thread gets early and late parts in turn
                half = tirx.truncdiv(part, int64(2))
                part = tirx.Select(tirx.EQ(tirx.truncmod(part, int64(2)), int64(0)), half, parts - 1 - half)
            first = settled(kernel, part * each)
            own = settled(kernel, tirx.max(int64(0), tirx.min(each, tiles - first)))
            groups = int64(self.groups)
            batch, group = settled(kernel, tirx.truncdiv(pair, groups)), settled(kernel, tirx.truncmod(pair, groups))
            self.write_group(batch, group, first, own)

    def parts(self, pairs: Any, threads: int) -> Any:
        """Parts of the rows: one where groups of heads can be shared out evenly, or nearly."""
        wanted = 2 * threads if self.masks.causal else threads
        if threads == 1:
            return int64(1)
        even = tirx.any(tirx.EQ(tirx.truncmod(pairs, int64(threads)), int64(0)), pairs >= 8 * threads)
        return tirx.Select(tirx.any(even, self.rows < wanted * _LEAST_ROWS), int64(1), int64(wanted))

    def write_group(self, batch: Any, group: Any, first_tile: Any, tiles: Any) -> None:
        kernel, share = self.kernel, self.heads // self.groups
        memory = self.memory(tiles * share)
        columns = self.columns
        if self.masks.causal:  # keys that any row of the task attends to
            columns = tirx.min(columns, (first_tile + tiles) * self.tile_rows)
        with kernel.serial(int64(1) if self.one_block else ceiling(columns, self.block)) as number:
            start = int64(0) if self.one_block else number * self.block
            left = tirx.min(self.columns - start, int64(self.block))
            count = self.columns if self.one_block else settled(kernel, left)
            self.copy_keys(memory, batch, group, start, count)
            if memory.values is not None:
                self.copy_values(memory, batch, group, start, count)
            with kernel.serial(int64(share)) as member, kernel.serial(tiles) as tile:
                first_row = settled(kernel, (first_tile + tile) * self.tile_rows)
                rows = _Rows(
                    batch, group, group * share + member, first_row, start, count, member * tiles + tile, memory
                )
                later = self.masks.causal and not self.one_block
                with _only_if(start < first_row + self.tile_rows if later else None):
                    self.write_rows(rows)

    def memory(self, tiles: Any) -> Memory:
        kernel = self.kernel
        most = ceiling(self.rows, self.tile_rows) * (self.heads // self.groups)
        state = None if self.one_block else kernel.scratch(most, 2, self.folded)
        if state is not None:
            with kernel.serial(tiles) as tile:
                for number, start in enumerate((MASKED, 0.0)):
                    with kernel.vectorized(self.folded) as lane:
                        T.buffer_store(state, f32(start), [tile, number, lane])
        return Memory(
            kernel.scratch(self.padded // self.tile_columns, self.depth, self.tile_columns),
            None if self.values_in_place else kernel.scratch(self.padded // self.each, self.value_vectors, self.lanes),
            kernel.scratch(self.tile_rows, self.padded + self.lanes),  # rows apart by no power of two
            kernel.scratch(self.tile_rows, (self.padded + self.lanes) // 2) if self.pairs else None,
            state,
        )

    # One tile of rows -------------------------------------------------------------------------------------------------
    def write_rows(self, rows: _Rows) -> None:
        kernel = self.kernel
        limit = free = rows.count
        if self.masks.causal:  # `limit` columns reach some row of the tile, `free` of them every row
            limit = settled(kernel, tirx.min(limit, rows.first + self.tile_rows - rows.start))
            free = settled(kernel, tirx.max(int64(0), tirx.min(free, rows.first + 1 - rows.start)))
        tops = kernel.registers(self.tile_rows, 1, self.lanes)
        fill_tile(kernel, tops, self.tile_rows, 1, MASKED)
        full = tirx.truncdiv(free, int64(self.tile_columns))
        full = settled(kernel, full)
        with kernel.serial(full) as panel:
            self.write_scores(rows, tops, panel, int64(0), self.vectors)
        done = full * self.vectors
        with kernel.serial(tirx.max(int64(0), ceiling(limit, self.lanes) - done)) as rest:
            panel, column = self.place(done + rest)
            self.write_scores(rows, tops, panel, column, 1)
        numbers = _Numbers(*(kernel.registers(self.folded) for _ in range(3)))
        self.write_shift(rows, tops, numbers)
        fill_tile(kernel, tops, self.tile_rows, 1, 0.0)
        self.write_weights(rows, numbers, tops, limit)
        self.write_scale(rows, tops, numbers)
        for begin in range(0, self.value_vectors, self.vectors):
            self.write_context(rows, numbers, limit, begin, min(self.vectors, self.value_vectors - begin))
        if not self.epilogue.bare:
            own = tirx.min(int64(self.tile_rows), self.rows - rows.first)
            with _only_if(self.finished(rows)):
                self.epilogue.write(rows.batch, rows.first, own, self.folded, rows.head)

    def write_scores(self, rows: _Rows, tops: Any, panel: Any, column: Any, vectors: int) -> None:
        """Of whole panels, which nothing but a given mask concerns, or of single vectors at the right end."""
        kernel, lanes, keys = self.kernel, self.lanes, rows.memory.keys
        numbers = [settled(kernel, tirx.min(rows.first + r, self.rows - 1)) for r in range(self.tile_rows)]
        starts = [settled(kernel, self.q.at(rows.batch, rows.head, number)) for number in numbers]
        total = kernel.registers(self.tile_rows, vectors, lanes)
        zero_tile(kernel, total, self.tile_rows, vectors)
        steps = 4 if self.depth % 4 == 0 else 1
        with kernel.serial(int64(self.depth // steps)) as outer:
            for inner in range(steps):
                d = outer * steps + inner
                for r in range(self.tile_rows):
                    for c in range(vectors):
                        if self.pairs:
                            words = keys[panel, d, span(column + c * lanes, lanes)]
                            word = word_at(self.q.flat, starts[r] + 2 * d)
                            T.buffer_store(total, *add_products(total, r, c, word, words, lanes))
                            continue
                        with kernel.vectorized(lanes) as lane:
                            term = self.q.flat[starts[r] + d] * keys[panel, d, column + c * lanes + lane]
                            T.buffer_store(total, total[r, c, lane] + term, [r, c, lane])
        for c in range(vectors):
            self.finish_scores(rows, tops, total, numbers, c, panel * self.tile_columns + column + c * lanes)

    def finish_scores(self, rows: _Rows, tops: Any, total: Any, numbers: list[Any], c: int, first: Any) -> None:
        """Scale and mask one vector of columns of every row; `first` counts from the start of the block."""
        kernel, lanes, cut = self.kernel, self.lanes, total.shape[1] == 1
        shared = kernel.registers(lanes)
        axes = (rows.batch, rows.head)
        last = self.columns - 1

        def column(lane: Any) -> Any:
            at = rows.start + first + lane
            return tirx.min(at, last) if cut else at

        if self.masks.same_for_rows:
            with kernel.vectorized(lanes) as lane:
                T.buffer_store(shared, self.masks.term(kernel, (*axes, int64(0), column(lane))), [lane])
        for r, number in enumerate(numbers):
            inside = rows.count - first
            if self.masks.causal:
                inside = tirx.min(inside, number + 1 - rows.start - first)
            with kernel.vectorized(lanes) as lane:
                score = total[r, c, lane] if self.raw else total[r, c, lane] * f32(self.scale)
                if self.masks.same_for_rows:
                    score = score + shared[lane]
                elif self.masks.given is not None:
                    score = score + self.masks.term(kernel, (*axes, number, column(lane)))
                if cut:
                    score = tirx.Select(lane.astype("int32") < inside.astype("int32"), score, f32(MASKED))
                score = T.bind(score)
                T.buffer_store(rows.memory.scores, score, [r, first + lane])
                T.buffer_store(tops, tirx.max(tops[r, 0, lane], score), [r, 0, lane])

    def exponent(self, score: Any, shift: Any, lanes: int = 1) -> Any:
        """Of 2, for a score less the largest one of its row, which `shift` holds in the same units."""

        def splat(value: Any) -> Any:
            return value if lanes == 1 else tirx.Broadcast(value, lanes)

        if self.raw:
            return score * splat(f32(self.scale * _LOG2_E)) - splat(shift)
        return (score - splat(shift)) * splat(f32(_LOG2_E))

    def write_shift(self, rows: _Rows, tops: Any, numbers: _Numbers) -> None:
        """The largest score of each row so far, and what the sums before this block are worth now."""
        kernel, state = self.kernel, rows.memory.state
        vectors = [T.bind(tops[r, 0, span(0, self.lanes)]) for r in range(self.tile_rows)]
        store_folded(kernel, numbers.scale, vectors, "max")
        with kernel.vectorized(self.folded) as lane:
            top = numbers.scale[lane]
            if state is not None:
                top = T.bind(tirx.max(state[rows.state, 0, lane], top))
            nothing = tirx.EQ(top, f32(MASKED))
            shift = T.bind(tirx.Select(nothing, f32(0), top * f32(self.scale * _LOG2_E) if self.raw else top))
            T.buffer_store(numbers.shift, shift, [lane])
            if state is not None:
                earlier = self.exponent(state[rows.state, 0, lane], shift)
                T.buffer_store(numbers.factor, approximations.exp2_nonpositive(earlier)[0], [lane])
                T.buffer_store(state, top, [rows.state, 0, lane])

    def write_weights(self, rows: _Rows, numbers: _Numbers, sums: Any, limit: Any) -> None:
        """Some rows at a time, so that their shifts and sums have registers."""
        scores, whole = rows.memory.scores, span(0, self.lanes)
        together = 4 if self.lanes == 16 else 2  # the polynomial's constants take ten registers
        for begin in range(0, self.tile_rows, together):
            some = range(begin, min(begin + together, self.tile_rows))
            with self.kernel.serial(ceiling(limit, self.lanes)) as vector:
                place = span(vector * self.lanes, self.lanes)
                exponents = [self.exponent(T.bind(scores[r, place]), numbers.shift[r], self.lanes) for r in some]
                for r, weight in zip(some, approximations.exp2_nonpositive(*exponents), strict=True):
                    weight = T.bind(weight)
                    if self.pairs:
                        half = self.lanes // 2
                        words = rounded_words(weight, self.lanes)
                        T.buffer_store(rows.memory.weights, words, [r, span(vector * half, half)])
                    else:
                        T.buffer_store(scores, weight, [r, place])
                    T.buffer_store(sums, sums[r, 0, whole] + weight, [r, 0, whole])

    def write_scale(self, rows: _Rows, sums: Any, numbers: _Numbers) -> None:
        """What the second product is multiplied by: 1 / sum once all keys are in; rows without any key get 0."""
        kernel, state = self.kernel, rows.memory.state
        vectors = [T.bind(sums[r, 0, span(0, self.lanes)]) for r in range(self.tile_rows)]
        store_folded(kernel, numbers.scale, vectors, "sum")
        with kernel.vectorized(self.folded) as lane:
            total = numbers.scale[lane]
            if state is not None:
                total = T.bind(state[rows.state, 1, lane] * numbers.factor[lane] + total)
                T.buffer_store(state, total, [rows.state, 1, lane])
            scale = tirx.Select(tirx.EQ(total, f32(0)), f32(0), f32(1) / total)
            if (finished := self.finished(rows)) is not None:
                scale = tirx.Select(finished, scale, f32(1))
            T.buffer_store(numbers.scale, scale, [lane])

    def finished(self, rows: _Rows) -> Any:
        """Whether no later block concerns the tile; None where there is one block."""
        if self.one_block:
            return None
        reach = tirx.min(self.columns, rows.first + self.tile_rows) if self.masks.causal else self.columns
        return rows.start + self.block >= reach

    def write_context(self, rows: _Rows, numbers: _Numbers, limit: Any, begin: int, width: int) -> None:
        kernel, lanes, scores = self.kernel, self.lanes, rows.memory.scores
        context = kernel.registers(self.tile_rows, width, lanes)
        zero_tile(kernel, context, self.tile_rows, width)
        origin = settled(kernel, self.v.at(rows.batch, rows.group, rows.start))

        def step(column: Any) -> None:
            for r in range(self.tile_rows):
                for c in range(width):
                    if self.pairs:
                        word = tirx.reinterpret("uint32", rows.memory.weights[r, column])
                        words = rows.memory.values[column, begin + c, span(0, lanes)]
                        T.buffer_store(context, *add_products(context, r, c, word, words, lanes))
                        continue
                    with kernel.vectorized(lanes) as lane:
                        if rows.memory.values is None:
                            at = origin + column * self.v.row + (begin + c) * lanes + lane
                            value = self.v.flat[at]
                        else:
                            value = rows.memory.values[column, begin + c, lane]
                        T.buffer_store(context, context[r, c, lane] + scores[r, column] * value, [r, c, lane])

        limit = ceiling(limit, self.each)
        main = tirx.truncdiv(limit, int64(_STEPS))
        with kernel.serial(main) as outer:
            for inner in range(_STEPS):
                step(outer * _STEPS + inner)
        with kernel.serial(limit - main * _STEPS) as rest:
            step(main * _STEPS + rest)
        for r in range(self.tile_rows):
            with _only_if(rows.first + r < self.rows):
                row = rows.batch * self.rows + rows.first + r
                start = settled(kernel, (row * self.heads + rows.head) * self.value_depth)
                for c in range(width):
                    self.store_context(rows, numbers, context, r, c, start + (begin + c) * lanes, begin + c)

    def store_context(
        self, rows: _Rows, numbers: _Numbers, context: Any, r: int, c: int, start: Any, vector: int
    ) -> None:
        """One vector of depth; with several blocks on top of what the output holds from those before."""
        kernel = self.kernel
        width = min(self.lanes, self.value_depth - vector * self.lanes)
        if not self.one_block:
            with _only_if(rows.start > 0), kernel.vectorized(width) as lane:
                earlier = self.output.flat[start + lane] * numbers.factor[r]
                T.buffer_store(context, context[r, c, lane] + earlier, [r, c, lane])
        with kernel.vectorized(width) as lane:
            self.output.store(start + lane, context[r, c, lane] * numbers.scale[r])


@contextmanager
def _only_if(condition: Any) -> Iterator[None]:
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield
