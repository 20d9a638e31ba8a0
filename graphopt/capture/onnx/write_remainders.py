"""How a remainder of floats is written in ONNX: that of a truncated quotient, moved to the sign of the divisor.

It is exact, and right for divisors that are infinite, where x - floor(x / y) * y is not a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op


def _remainder(left: Any, right: Any) -> Any:
    if not left.dtype.is_floating_point():
        return op.Mod(left, right)
    found = op.Mod(left, right, fmod=1)
    zero = op.CastLike(op.Constant(value_float=0.0), found)
    other = op.And(op.Not(op.Equal(found, zero)), op.Xor(op.Less(found, zero), op.Less(right, zero)))
    return op.Where(other, op.Add(found, right), found)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {torch.ops.aten.remainder.Tensor: _remainder}
"""By operator, for the exporter; all of it is there at opset 18 and later."""
