"""How element-wise operators are written in ONNX where the exporter's own form gives other numbers.

A remainder of floats is that of a truncated quotient, moved to the sign of the divisor: exact, and right for divisors
that are infinite, where x - floor(x / y) * y is not a number. An exponential linear unit scales its input below 0 only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

aten = torch.ops.aten


def _remainder(left: Any, right: Any) -> Any:
    if not left.dtype.is_floating_point():
        return op.Mod(left, right)
    found = op.Mod(left, right, fmod=1)
    zero = _number(0.0, found)
    other = op.And(op.Not(op.Equal(found, zero)), op.Xor(op.Less(found, zero), op.Less(right, zero)))
    return op.Where(other, op.Add(found, right), found)


def _elu(value: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    below = op.Elu(op.Mul(value, _number(input_scale, value)), alpha=alpha)
    result = op.Where(op.Greater(value, _number(0.0, value)), value, below)
    return result if scale == 1 else op.Mul(result, _number(scale, value))


def _number(number: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value_float=number), like)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {aten.remainder.Tensor: _remainder, aten.elu.default: _elu}
"""By operator, for the exporter; all of it is there at opset 18 and later."""
