"""What differs in attention where queries, keys and values are bfloat16 and the target multiplies pairs of them.

Pairs of the depth in the first product and pairs of keys in the second are 32-bit words. Words lie in memory and in
registers as float32 that nothing computes with: the compiler then sees one type in a buffer, and shuffles are those of
float32. Scores, the softmax and all sums are float32; weights are rounded to bfloat16 before the second product.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.instructions import as_pair, multiply_pairs, round_lanes
from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.rules.attention_operands import Strides
from graphopt.backends.rules.lanes import span
from graphopt.backends.values import View


def halves_of(kernel: Kernel, view: View) -> Strides:
    """As `strides_of`, over the bits of bfloat16, uint16."""
    batch, head, row = (kernel.size(stride) for stride in view.strides[:3])
    return Strides(kernel.words(view.storage, "uint16"), kernel.size(view.offset), batch, head, row)


def words_at(halves: Any, start: Any, lanes: int) -> Any:
    """A vector of words that lie beside each other from `start` on, which counts halves."""
    return tirx.reinterpret(f"float32x{lanes}", halves[span(start, 2 * lanes)])


def word_at(halves: Any, start: Any) -> Any:
    """One word, uint32."""
    return as_pair(halves[start], halves[start + 1])


def as_number(word: Any) -> Any:
    return tirx.reinterpret("float32", word)


def interleaved(halves: Any, first: Any, second: Any, lanes: int) -> Any:
    """A vector of words: lower halves from `first` on, upper ones from `second` on."""
    lower, upper = (halves[span(start, lanes)].astype(f"uint32x{lanes}") for start in (first, second))
    word = lower | (upper << tirx.Broadcast(tirx.const(16, "uint32"), lanes))
    return tirx.reinterpret(f"float32x{lanes}", word)


def rounded_words(weights: Any, lanes: int) -> Any:
    """A vector of float32 as half as many words."""
    return tirx.reinterpret(f"float32x{lanes // 2}", round_lanes(weights))


def add_products(total: Any, r: int, c: int, word: Any, words: Any, lanes: int) -> tuple[Any, list[Any]]:
    """The sum and its place in total [rows, vectors, lanes] with the products of a uint32 word and a vector added."""
    place = [int64(r), int64(c), span(0, lanes)]
    bits = tirx.reinterpret(f"uint32x{lanes}", words)
    return multiply_pairs(total[r, c, span(0, lanes)], tirx.Broadcast(word, lanes), bits), place
