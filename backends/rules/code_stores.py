"""Vectors of int32 that become bytes in memory: narrowed four or two at a time, which clips them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.code_instructions import PACKED, PACKED_LANES, pack_codes
from graphopt.backends.kernel import Kernel, Output, int64

BYTES = {"uint8": (0, 255), "int8": (-128, 127)}


def packs(kernel: Kernel, output: Output) -> bool:
    """Whether `store_codes` stores elements of this output."""
    return kernel.target.lanes == PACKED_LANES and output.dtype in BYTES


def store_codes(kernel: Kernel, output: Output, place: Any, vectors: int, element: Callable[[int, Any], Any]) -> bool:
    """Store element(vector, lane) of 2 or 4 whole vectors from `place` on; False where the output has no bytes."""
    if not packs(kernel, output) or vectors not in PACKED:
        return False
    whole = tirx.Ramp(int64(0), int64(1), PACKED_LANES)
    limits = bounds = BYTES[output.dtype]
    codes = kernel.registers(vectors, PACKED_LANES, dtype="int32")
    for vector in range(vectors):
        with kernel.vectorized(PACKED_LANES) as lane:
            code, bounds = before_clip(element(vector, lane).astype(output.dtype))
            T.buffer_store(codes, code, [vector, lane])
    packed = pack_codes([codes[vector, whole] for vector in range(vectors)], output.dtype)
    for choose, bound, limit in zip((tirx.max, tirx.min), bounds, limits, strict=True):
        if bound != limit:
            packed = choose(packed, tirx.Broadcast(tirx.const(bound, output.dtype), PACKED_LANES * vectors))
    T.buffer_store(output.flat, packed, [tirx.Ramp(place, int64(1), PACKED_LANES * vectors)])
    return True


def before_clip(value: Any) -> tuple[Any, tuple[int, int]]:
    """An int32 that becomes `value`, a byte, where it is clipped between these bounds."""
    inner = value.value if isinstance(value, tirx.Cast) else None
    if isinstance(inner, tirx.Min) and isinstance(inner.a, tirx.Max):
        (code, low), high = (inner.a.a, inner.a.b), inner.b
        if isinstance(low, tirx.IntImm) and isinstance(high, tirx.IntImm) and str(code.ty.dtype) == "int32":
            return code, (int(low.value), int(high.value))
    return value.astype("int32"), BYTES[str(value.ty.dtype)]
