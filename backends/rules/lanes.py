"""Whole vectors of float32 as values: small buffers that stay in registers, and shuffles between vectors.

A shuffle costs about one instruction a vector of its result; lane by lane the same would cost one an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.rules.generic import combined


def zero_tile(kernel: Kernel, tile: Any, rows: int, vectors: int) -> None:
    """tile [rows, vectors, lanes] of float32."""
    fill_tile(kernel, tile, rows, vectors, 0.0)


def fill_tile(kernel: Kernel, tile: Any, rows: int, vectors: int, value: float) -> None:
    """tile [rows, vectors, lanes] of float32."""
    for r in range(rows):
        for c in range(vectors):
            with kernel.vectorized(kernel.target.lanes) as lane:
                T.buffer_store(tile, tirx.const(value, "float32"), [r, c, lane])


def fold_lanes(kernel: Kernel, buffer: Any, vectors: int, combine: str) -> None:
    """All of buffer [vectors, lanes] into buffer[0, 0], as a tree: lane after lane would cost 60 cycles."""
    for c in range(1, vectors):
        with kernel.vectorized(kernel.target.lanes) as lane:
            T.buffer_store(buffer, combined(combine, buffer[0, lane], buffer[c, lane]), [0, lane])
    half = kernel.target.lanes // 2
    while half:
        with kernel.vectorized(half) as lane:
            T.buffer_store(buffer, combined(combine, buffer[0, lane], buffer[0, lane + half]), [0, lane])
        half //= 2


def span(position: Any, lanes: int) -> Any:
    """The index of `lanes` elements from `position` on, for loads and stores of a whole vector; of one, a scalar's."""
    return int64(position) if lanes == 1 else tirx.Ramp(int64(position), int64(1), lanes)


def vector_type(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def same(value: Any, lanes: int) -> Any:
    """The value in all lanes of a vector."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def transposed(vectors: Sequence[Any]) -> list[Any]:
    """n vectors of n lanes, n a power of two, as a matrix with rows and columns exchanged: n log n shuffles."""
    result, count, step = list(vectors), len(vectors), 1
    while step < count:
        for i in range(count):
            if i & step:
                continue
            a, b = result[i], result[i + step]
            low = [count + j - step if j & step else j for j in range(count)]
            high = [count + j if j & step else j + step for j in range(count)]
            result[i], result[i + step] = shuffled([a, b], low), shuffled([a, b], high)
        step *= 2
    return result


def fold_rows(vectors: Sequence[Any], lanes: int, combine: str) -> Any:
    """Vector number r folded to lane r of one vector; "max" or "sum", "max" may lose NaN.

    Vectors are merged in pairs, so n of them take 2 n shuffles in place of log2(lanes) each. The result has as many
    lanes as the next power of two of their number, of which the last repeat the first vector.
    """
    rows = list(vectors)
    while len(rows) & (len(rows) - 1):
        rows.append(vectors[0])
    if len(rows) > lanes:  # a vector has no lane for each
        half = len(rows) // 2
        parts = [fold_rows(rows[:half], lanes, combine), fold_rows(rows[half:], lanes, combine)]
        return shuffled(parts, range(len(rows)))
    apply = tirx.max if combine == "max" else lambda a, b: a + b
    width = lanes  # of the part of a vector that belongs to one row
    while len(rows) > 1:
        lower, upper = _halves(2 * lanes, width)
        rows = [
            T.bind(apply(shuffled([a, b], lower), shuffled([a, b], upper)))
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
        width //= 2
    (result,) = rows
    while width > 1:
        lower, upper = _halves(lanes, width)
        result = T.bind(apply(shuffled([result], lower), shuffled([result], upper)))
        lanes, width = lanes // 2, width // 2
    return result


def store_folded(kernel: Kernel, buffer: Any, vectors: Sequence[Any], combine: str, start: Any = 0) -> None:
    """Store vector number r, folded, at buffer[start + r]; behind the last one up to the next power of two anything."""
    lanes = kernel.target.lanes
    if lanes == 1:
        for number, value in enumerate(vectors):
            T.buffer_store(buffer, value, [int64(start) + number])
    else:
        folded = fold_rows(vectors, lanes, combine)
        T.buffer_store(buffer, folded, [span(start, tvm.DataType(str(folded.ty.dtype)).lanes)])


def _halves(count: int, width: int) -> tuple[list[int], list[int]]:
    """Of `count` lanes in parts of `width`: the lower half of each part, the upper half of each part."""
    lower = [lane for lane in range(count) if lane % width < width // 2]
    return lower, [lane + width // 2 for lane in lower]


def shuffled(vectors: Sequence[Any], order: Sequence[int]) -> Any:
    """One vector of the lanes with these numbers, counted through all `vectors`."""
    return T.bind(tirx.Shuffle(list(vectors), [tirx.const(number, "int32") for number in order]))


def settled(kernel: Kernel, number: Any) -> Any:
    """An int64 computed once, for use in many indices: TVM's simplifier takes bound variables apart in each."""
    if isinstance(number, (int, tirx.IntImm)):
        return int64(number)
    place = kernel.registers(1, dtype="int64")
    T.buffer_store(place, number, [0])
    return place[0]
