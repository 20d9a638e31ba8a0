"""Attention of one query row over many keys, as in decoding: bound by reading keys and values once, as they lie.

A task is one group of heads that share keys; blocks of keys stay in the L2 cache while the heads pass. 16 keys times
the row are 16 vectors of partial products, folded to one vector of 16 scores by 30 shuffles, so nothing is transposed.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.rules.attention_epilogue import Epilogue
from graphopt.backends.rules.attention_operands import MASKED, Masks, Strides, strides_of
from graphopt.backends.rules.lanes import fold_lanes, settled, span, store_folded, vector_type
from graphopt.backends.values import View

f32 = approximations.f32
_BLOCK = 256  # keys of one block
_CHAINS = 4  # independent sums: a multiply-add has a latency of four


def write_single_rows(
    kernel: Kernel, q: View, k: View, v: View, masks: Masks, scale: float, epilogue: Epilogue
) -> None:
    """q [B, H, 1, D], k [B, G, T, D], v [B, G, T, E]; D and E are whole vectors. The output has [B, 1, H, E]."""
    groups = int(k.shape[1])
    with kernel.parallel(kernel.size(q.shape[0]) * groups) as pair:
        batch, group = tirx.truncdiv(pair, int64(groups)), tirx.truncmod(pair, int64(groups))
        _SingleRows(kernel, q, k, v, masks, scale, epilogue, batch, group).write()


class _SingleRows:
    def __init__(
        self,
        kernel: Kernel,
        q: View,
        k: View,
        v: View,
        masks: Masks,
        scale: float,
        epilogue: Epilogue,
        batch: Any,
        group: Any,
    ) -> None:
        self.kernel, self.masks, self.scale = kernel, masks, scale
        self.epilogue, self.output = epilogue, epilogue.output
        self.q, self.k, self.v = (strides_of(kernel, view) for view in (q, k, v))
        self.batch, self.group, self.lanes = batch, group, kernel.target.lanes
        self.depth_vectors, self.value_vectors = (int(x.shape[3]) // self.lanes for x in (q, v))
        self.heads = int(q.shape[1])
        self.share = self.heads // int(k.shape[1])
        self.columns = int64(1) if masks.causal else kernel.size(k.shape[2])  # the first row reaches the first key only
        self.scores = kernel.scratch(_BLOCK)
        self.state = kernel.scratch(self.share, 2)  # largest score and sum of weights of each head

    def write(self) -> None:
        kernel = self.kernel
        with kernel.serial(int64(self.share)) as member:
            for number, start in enumerate((MASKED, 0.0)):
                T.buffer_store(self.state, f32(start), [member, int64(number)])
        with kernel.serial(tirx.truncdiv(self.columns + (_BLOCK - 1), int64(_BLOCK))) as block:
            first = block * _BLOCK
            count = tirx.min(self.columns - first, int64(_BLOCK))
            with kernel.serial(int64(self.share)) as member:
                self.write_block(member, first, count)

    def numbers(self, operand: Strides, start: Any) -> Any:
        """A vector of float32, from `start` on."""
        return operand.flat[span(start, self.lanes)].astype(vector_type("float32", self.lanes))

    def write_block(self, member: Any, first: Any, count: Any) -> None:
        kernel, lanes = self.kernel, self.lanes
        head = self.group * self.share + member
        top = kernel.registers(1, lanes)
        _fill(kernel, top, 1, MASKED)
        vectors = tirx.truncdiv(count + (lanes - 1), int64(lanes))
        row = settled(kernel, self.q.at(self.batch, head, int64(0)))
        query = [T.bind(self.numbers(self.q, row + d * lanes)) for d in range(self.depth_vectors)]
        with kernel.serial(vectors) as vector:
            self.write_scores(query, top, head, first + vector * lanes, vector * lanes, count)
        fold_lanes(kernel, top, 1, "max")
        shift, factor = kernel.registers(1), kernel.registers(1)
        largest = T.bind(tirx.max(self.state[member, 0], top[0, 0]))
        T.buffer_store(shift, tirx.Select(tirx.EQ(largest, f32(MASKED)), f32(0), largest), [0])
        T.buffer_store(factor, _weight(self.state[member, 0] - shift[0])[0], [0])
        T.buffer_store(self.state, largest, [member, int64(0)])
        total = kernel.registers(1, lanes)
        _fill(kernel, total, 1, 0.0)
        with kernel.serial(vectors) as vector, kernel.vectorized(lanes) as lane:
            weight = T.bind(_weight(self.scores[vector * lanes + lane] - shift[0])[0])
            T.buffer_store(self.scores, weight, [vector * lanes + lane])
            T.buffer_store(total, total[0, lane] + weight, [0, lane])
        fold_lanes(kernel, total, 1, "sum")
        weights = T.bind(self.state[member, 1] * factor[0] + total[0, 0])
        T.buffer_store(self.state, weights, [member, int64(1)])
        scale = kernel.registers(1)
        inverse = tirx.Select(tirx.EQ(weights, f32(0)), f32(0), f32(1) / weights)
        finished = first + _BLOCK >= self.columns
        T.buffer_store(scale, tirx.Select(finished, inverse, f32(1)), [0])
        self.write_context(head, first, count, factor, scale)
        if not self.epilogue.bare:
            with T.If(finished), T.Then():
                self.epilogue.write(self.batch, int64(0), int64(1), 1, head)

    def write_scores(self, query: list[Any], top: Any, head: Any, first: Any, place: Any, count: Any) -> None:
        """One vector of scores; behind the last key the last one is read again and masked."""
        kernel, lanes, last = self.kernel, self.lanes, self.columns - 1
        starts = [
            settled(kernel, self.k.at(self.batch, self.group, tirx.min(first + lane, last))) for lane in range(lanes)
        ]
        sums = []
        for start in starts:
            total = query[0] * self.numbers(self.k, start)
            for d in range(1, self.depth_vectors):
                total = total + query[d] * self.numbers(self.k, start + d * lanes)
            sums.append(T.bind(total))
        store_folded(kernel, self.scores, sums, "sum", place)
        with kernel.vectorized(lanes) as lane:
            score = self.scores[place + lane] * f32(self.scale)
            if self.masks.given is not None:
                axes = (self.batch, head, int64(0), tirx.min(first + lane, last))
                score = score + self.masks.term(kernel, axes)
            inside = (count - place).astype("int32")
            score = T.bind(tirx.Select(lane.astype("int32") < inside, score, f32(MASKED)))
            T.buffer_store(self.scores, score, [place + lane])
            T.buffer_store(top, tirx.max(top[0, lane], score), [0, lane])

    def write_context(self, head: Any, first: Any, count: Any, factor: Any, scale: Any) -> None:
        kernel, lanes, vectors = self.kernel, self.lanes, self.value_vectors
        chains = max(1, _CHAINS // vectors)
        sums = kernel.registers(chains * vectors, lanes)
        _fill(kernel, sums, chains * vectors, 0.0)
        start = settled(kernel, self.v.at(self.batch, self.group, first))

        def step(column: Any, chain: int) -> None:
            for c in range(vectors):
                with kernel.vectorized(lanes) as lane:
                    value = self.v.flat[start + column * self.v.row + c * lanes + lane].astype("float32")
                    at = chain * vectors + c
                    T.buffer_store(sums, sums[at, lane] + self.scores[column] * value, [at, lane])

        main = tirx.truncdiv(count, int64(_CHAINS))
        with kernel.serial(main) as outer:
            for inner in range(_CHAINS):
                step(outer * _CHAINS + inner, inner % chains)
        with kernel.serial(count - main * _CHAINS) as rest:
            step(main * _CHAINS + rest, 0)
        for c in range(vectors):
            for chain in range(1, chains):
                with kernel.vectorized(lanes) as lane:
                    T.buffer_store(sums, sums[c, lane] + sums[chain * vectors + c, lane], [c, lane])
            at = (self.batch * self.heads + head) * (vectors * lanes) + c * lanes
            with T.If(first > 0), T.Then(), kernel.vectorized(lanes) as lane:
                T.buffer_store(sums, sums[c, lane] + self.output.flat[at + lane] * factor[0], [c, lane])
            with kernel.vectorized(lanes) as lane:
                self.output.store(at + lane, sums[c, lane] * scale[0])


def _weight(distance: Any) -> list[Any]:
    """e^distance, for what is at most 0."""
    return approximations.exp2_nonpositive(distance * f32(1 / math.log(2)))


def _fill(kernel: Kernel, buffer: Any, vectors: int, value: float) -> None:
    for number in range(vectors):
        with kernel.vectorized(kernel.target.lanes) as lane:
            T.buffer_store(buffer, f32(value), [number, lane])
