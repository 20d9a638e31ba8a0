"""Small buffers of whole vectors, [..., lanes], that stay in registers: zeroing them and folding them to one number."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel
from graphopt.backends.rules.generic import combined


def zero_tile(kernel: Kernel, tile: Any, rows: int, vectors: int) -> None:
    """tile [rows, vectors, lanes] of float32."""
    for r in range(rows):
        for c in range(vectors):
            with kernel.vectorized(kernel.target.lanes) as lane:
                T.buffer_store(tile, tirx.const(0, "float32"), [r, c, lane])


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
