"""How far results are from those that a test asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_TWO_STEPS = {"bfloat16": 2.0**-6, "float16": 2.0**-9}  # ONNX's own runner allows them to bfloat16


class Mismatch(Exception):
    """A result is not what the test asks for; `kind` is `count`, `type`, `shape` or `value`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def judge(wanted: Sequence[Any], found: Sequence[Any], rtol: float, atol: float) -> float:
    """The largest error in ULP, 0 where there are no floats. Raises Mismatch for the first output that is wrong."""
    if len(wanted) != len(found):
        raise Mismatch("count", f"{len(found)} outputs where {len(wanted)} are asked for")
    pairs = enumerate(zip(wanted, found, strict=True))
    return max((_judge_output(f"output {n}", a, b, rtol, atol) for n, (a, b) in pairs), default=0.0)


def _judge_output(where: str, wanted: np.ndarray, found: np.ndarray, rtol: float, atol: float) -> float:
    if wanted.dtype != found.dtype:
        raise Mismatch("type", f"{where} is {found.dtype} where {wanted.dtype} is asked for")
    if wanted.shape != found.shape:
        raise Mismatch("shape", f"{where} has the shape {list(found.shape)} where {list(wanted.shape)} is asked for")
    if wanted.dtype.kind in "biu":
        wrong = wanted != found
    elif wanted.dtype.kind == "c":
        wrong = ~np.isclose(found, wanted, rtol, atol, equal_nan=True)
    else:
        rtol = max(rtol, _TWO_STEPS.get(wanted.dtype.name, 0.0))
        wrong = ~np.isclose(found.astype(np.float64), wanted.astype(np.float64), rtol, atol, equal_nan=True)
    if wrong.any():
        at = tuple(int(index[0]) for index in np.nonzero(wrong)) if wanted.ndim else ()
        values = f"{found[at]} at {list(at)} where {wanted[at]} is asked for"
        raise Mismatch("value", f"{where} is {values}; {int(wrong.sum())} of {wrong.size} elements are wrong")
    return _ulp(wanted, found, atol / rtol if rtol else 0.0) if wanted.dtype.kind in "fV" else 0.0


def _ulp(wanted: np.ndarray, found: np.ndarray, least: float) -> float:
    """In steps of the type at the value asked for; at `least` where that is smaller, since there `atol` rules."""
    try:
        from ml_dtypes import finfo

        info: Any = finfo(wanted.dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        return 0.0  # codes of an integer type of ml_dtypes
    a, b = (array.astype(np.float64) for array in (wanted, found))
    compared = np.isfinite(a) & np.isfinite(b)
    if not compared.any():
        return 0.0
    a, b = a[compared], b[compared]
    scale = np.maximum(np.abs(a), max(least, float(info.smallest_normal)))
    steps = np.exp2(np.floor(np.log2(scale))) * float(info.eps)
    return float((np.abs(a - b) / steps).max())
