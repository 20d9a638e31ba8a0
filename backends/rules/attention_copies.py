"""Keys and values of an attention task as its tiles read them: keys in transposed panels, values in vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.instructions import as_pair
from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.rules.attention_operands import strides_of
from graphopt.backends.rules.attention_pairs import as_number, halves_of, interleaved, word_at, words_at
from graphopt.backends.rules.lanes import settled, span, transposed
from graphopt.backends.values import View

f32 = approximations.f32


def ceiling(a: Any, b: int) -> Any:
    return tirx.truncdiv(a + (b - 1), int64(b))


@dataclass(frozen=True)
class Memory:
    """Working memory of a task; all of it stays in the L2 cache."""

    keys: Any  # [panels, depth, columns of a panel]
    values: Any  # [keys, vectors of depth, lanes], or None where they are read where they are
    scores: Any  # [rows of a tile, keys]
    weights: Any  # [rows of a tile, pairs of keys], or None where scores become weights in place
    state: Any  # [tiles, 2, rows of a tile]: largest score and sum of weights so far, or None with one block


class Operands:
    """q [B, H, S, D], k [B, G, T, D] and v [B, G, T, E], and copies of the last two.

    So many `vectors` of keys, and of values, lie beside each other in a tile.
    """

    def __init__(self, kernel: Kernel, q: View, k: View, v: View, vectors: int) -> None:
        self.kernel, self.lanes, self.vectors = kernel, kernel.target.lanes, vectors
        self.pairs = q.dtype == BFLOAT16
        strides = halves_of if self.pairs else strides_of
        self.q, self.k, self.v = (strides(kernel, view) for view in (q, k, v))
        self.each = 2 if self.pairs else 1  # numbers that are multiplied at once
        self.depth, self.value_depth = int(q.shape[3]) // self.each, int(v.shape[3])
        self.heads, self.groups = int(q.shape[1]), int(k.shape[1])
        self.columns, self.tile_columns = kernel.size(k.shape[2]), vectors * self.lanes
        self.value_vectors = -(-self.value_depth // self.lanes)
        self.values_in_place = self.value_depth % self.lanes == 0 and not self.pairs

    def copy_keys(self, memory: Memory, batch: Any, group: Any, first: Any, count: Any) -> None:
        """Transposed; what pads the last vector repeats the last key, and its scores are masked."""
        kernel, lanes = self.kernel, self.lanes
        with kernel.serial(ceiling(count, lanes)) as vector:
            panel, column = self.place(vector)
            numbers = [tirx.min(first + vector * lanes + lane, self.columns - 1) for lane in range(lanes)]
            starts = [settled(kernel, self.k.at(batch, group, number)) for number in numbers]
            with kernel.serial(int64(self.depth // lanes)) as at:
                square = [T.bind(self.key_vector(start, at * lanes)) for start in starts]
                for number, row in enumerate(transposed(square)):
                    T.buffer_store(memory.keys, row, [panel, at * lanes + number, span(column, lanes)])
            for d in range(self.depth // lanes * lanes, self.depth):
                for lane, start in enumerate(starts):
                    T.buffer_store(memory.keys, self.key(start, d), [panel, int64(d), column + lane])

    def key_vector(self, start: Any, d: Any) -> Any:
        if self.pairs:
            return words_at(self.k.flat, start + 2 * d, self.lanes)
        return self.k.flat[span(start + d, self.lanes)]

    def key(self, start: Any, d: int) -> Any:
        return as_number(word_at(self.k.flat, start + 2 * d)) if self.pairs else self.k.flat[start + d]

    def place(self, vector: Any) -> tuple[Any, Any]:
        """Panel and column of a vector of keys."""
        beside = int64(self.vectors)
        return tirx.truncdiv(vector, beside), tirx.truncmod(vector, beside) * self.lanes

    def copy_values(self, memory: Memory, batch: Any, group: Any, first: Any, count: Any) -> None:
        """Lanes past the depth are 0."""
        kernel, lanes = self.kernel, self.lanes
        if self.pairs:
            self.copy_value_pairs(memory, batch, group, first, count)
            return
        with kernel.serial(count) as column:
            start = self.v.at(batch, group, first + column)
            for c in range(self.value_vectors):
                if (c + 1) * lanes <= self.value_depth:
                    with kernel.vectorized(lanes) as lane:
                        T.buffer_store(memory.values, self.v.flat[start + c * lanes + lane], [column, c, lane])
                    continue
                for number in range(lanes):
                    at = c * lanes + number
                    value = self.v.flat[start + at] if at < self.value_depth else f32(0)
                    T.buffer_store(memory.values, value, [column, c, number])

    def copy_value_pairs(self, memory: Memory, batch: Any, group: Any, first: Any, count: Any) -> None:
        """Two keys beside each other; the last is its own neighbour, whose weight is 0."""
        kernel, lanes = self.kernel, self.lanes
        with kernel.serial(ceiling(count, 2)) as pair:
            last = self.columns - 1
            numbers = [tirx.min(first + 2 * pair + number, last) for number in range(2)]
            one, two = (settled(kernel, self.v.at(batch, group, number)) for number in numbers)
            for c in range(self.value_vectors):
                if (c + 1) * lanes <= self.value_depth:
                    words = interleaved(self.v.flat, one + c * lanes, two + c * lanes, lanes)
                    T.buffer_store(memory.values, words, [pair, int64(c), span(0, lanes)])
                    continue
                for number in range(lanes):
                    at = c * lanes + number
                    inside = at < self.value_depth
                    word = as_number(as_pair(self.v.flat[one + at], self.v.flat[two + at])) if inside else f32(0)
                    T.buffer_store(memory.values, word, [pair, c, number])
