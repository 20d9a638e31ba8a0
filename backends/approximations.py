"""float32 functions as polynomials that vectorise: libm calls are scalar, one an element, and 30-100 times slower.

Coefficients are least-squares fits on Chebyshev nodes, made once at import. Largest errors against float64, tested:
exp 3e-7 relative, erf 1e-6 and tanh 5e-7 absolute, gelu 3e-6 absolute. Results below the smallest normal number are
0, since denormals make every later multiply-add a microcode assist. NaN and infinities come out as PyTorch gives them,
except that gelu has its limits at both infinities (PyTorch: NaN). What a formula reads more than once is bound to a
variable: as a tree it would be written out each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from numpy.polynomial import chebyshev
from tvm import tirx
from tvm.tirx.script.builder import ir as T

_LOG2_E = 1 / math.log(2)
# ln 2 in two parts: the first has few enough bits for an exact product with any exponent (Cody and Waite).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUNDING = 1.5 * 2**23 + 127
_LOWEST = -87.33  # e^x is a normal float32 from here on
_PHI_BOUND = 5.0
# float type -> (integer type of its size, mask of all bits but the sign, bits of infinity)
_BITS = {
    "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
    "float64": ("int64", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
_TANH_BOUND = 0.75


def _exp_fit(degree: int = 5) -> np.ndarray:
    """e^r on |r| <= ln(2) / 2, in powers of r; e^0 is 1, so that one score alone has log-softmax 0."""
    u = chebyshev.chebpts1(2000)
    x = u * math.log(2) / 2
    fit = chebyshev.cheb2poly(np.linalg.lstsq(chebyshev.chebvander(u, degree - 1) * x[:, None], np.expm1(x))[0])
    return np.asarray([1.0, *fit / (math.log(2) / 2) ** np.arange(degree)])


def _exp2_fit(degree: int = 5) -> np.ndarray:
    """2^r on |r| <= 1/2, in powers of r; 2^0 is 1."""
    u = chebyshev.chebpts1(2000)
    x = u / 2
    wanted = np.expm1(x * math.log(2))
    fit = chebyshev.cheb2poly(np.linalg.lstsq(chebyshev.chebvander(u, degree - 1) * x[:, None], wanted)[0])
    return np.asarray([1.0, *fit * 2.0 ** np.arange(degree)])


def _odd_fit(values: np.ndarray, x: np.ndarray, u: np.ndarray, degree: int) -> np.ndarray:
    """Q in powers of u = 2 x^2 / bound^2 - 1 such that x Q(u) follows `values`."""
    basis = chebyshev.chebvander(u, degree) * x[:, None]
    return np.asarray(chebyshev.cheb2poly(np.linalg.lstsq(basis, values, rcond=None)[0]))


def _phi_fit(degree: int = 12) -> np.ndarray:
    u = chebyshev.chebpts1(4000)
    x = np.sqrt((u + 1) / 2) * _PHI_BOUND
    return _odd_fit(np.array([0.5 * math.erf(value / math.sqrt(2)) for value in x]), x, u, degree)


def _tanh_fit(degree: int = 5) -> np.ndarray:
    u = chebyshev.chebpts1(2000)
    x = np.sqrt((u + 1) / 2) * _TANH_BOUND
    return _odd_fit(np.tanh(x), x, u, degree)


_EXP, _EXP2, _PHI, _TANH = _exp_fit(), _exp2_fit(), _phi_fit(), _tanh_fit()


def f32(value: float) -> Any:
    return tirx.const(float(value), "float32")


def _polynomial(coefficients: np.ndarray, x: Any) -> Any:
    x = T.bind(x)
    result = f32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + f32(coefficient)
    return result


def _power_of_two(exponent: Any) -> Any:
    return tirx.reinterpret("float32", (exponent + tirx.const(127, "int32")) << tirx.const(23, "int32"))


def _exp_parts(x: Any) -> tuple[Any, Any]:
    """x = whole ln 2 + r: (whole as int32, e^r). floor vectorises; nearbyint would make the loop serial."""
    x = T.bind(x)
    whole = T.bind(tirx.floor(x * f32(_LOG2_E) + f32(0.5)))
    fraction = x - whole * f32(_LN2_HIGH) - whole * f32(_LN2_LOW)
    return whole.astype("int32"), _polynomial(_EXP, fraction)


def exp2_nonpositive(*exponents: Any) -> list[Any]:
    """2^x of each x <= 0, exactly 0 below -126.5, NaN at NaN: twelve instructions a vector, of which eight multiply.

    Adding 1.5 2^23 + 127 rounds x to a whole number and leaves it, as an exponent of float32, in the lowest bits. That
    exponent is 0 from -127 on, so clipping does for small numbers what a selection would. Numbers or whole vectors;
    several are computed step by step beside each other, since one chain of steps is longer than a CPU looks ahead.
    """
    splat = _splat(exponents[0])
    low, rounding = splat(f32(-127)), splat(f32(_ROUNDING))
    bits_type, type_ = (str(splat(tirx.const(0, kind)).ty.dtype) for kind in ("int32", "float32"))
    clipped = [T.bind(x) for x in exponents]
    clipped = [T.bind(tirx.Select(x < low, low, x)) for x in clipped]
    bits = [T.bind(tirx.reinterpret(bits_type, x + rounding)) for x in clipped]
    # Through the bits, or TVM would take (x + c) - c for x.
    rests = [T.bind(x - (tirx.reinterpret(type_, b) - rounding)) for x, b in zip(clipped, bits, strict=True)]
    powers = [splat(f32(_EXP2[-1]))] * len(rests)
    for coefficient in _EXP2[-2::-1]:
        powers = [T.bind(power * x + splat(f32(coefficient))) for power, x in zip(powers, rests, strict=True)]
    shift = splat(tirx.const(23, "int32"))
    return [power * tirx.reinterpret(type_, b << shift) for power, b in zip(powers, bits, strict=True)]


def _splat(like: Any) -> Callable[[Any], Any]:
    """One number in as many lanes as `like` has."""
    lanes = tvm.DataType(str(like.ty.dtype)).lanes
    return lambda value: value if lanes == 1 else tirx.Broadcast(value, lanes)


def exp(x: Any) -> Any:
    """e^x; the scale is applied in two halves since 2^128 has no float32."""
    x = T.bind(x)
    clipped = tirx.max(tirx.min(x, f32(89)), f32(-88))
    whole, rest = _exp_parts(clipped)
    half = whole >> tirx.const(1, "int32")
    value = rest * _power_of_two(half) * _power_of_two(whole - half)
    value = tirx.Select(x < f32(_LOWEST), f32(0), value)
    value = tirx.Select(x > f32(88.7228), f32(math.inf), value)
    return keep_nan(x, value)


def is_nan(x: Any) -> Any:
    """By the bits: TVM simplifies `x != x` to false, and its intrinsic for this silently makes a loop scalar."""
    kind = str(x.ty.dtype)
    if kind not in _BITS:
        return tirx.isnan(x)
    bits, magnitude, infinity = _BITS[kind]
    return (tirx.reinterpret(bits, x) & tirx.const(magnitude, bits)) > tirx.const(infinity, bits)


def keep_nan(x: Any, value: Any) -> Any:
    """`value`, or x where x is not a number: min, max and integer conversion lose NaN."""
    return tirx.Select(is_nan(x), x, value)


def sigmoid(x: Any) -> Any:
    return f32(1) / (f32(1) + exp(f32(0) - x))


def tanh(x: Any) -> Any:
    """An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    x = T.bind(x)
    clipped = T.bind(tirx.max(tirx.min(x, f32(_TANH_BOUND)), f32(-_TANH_BOUND)))
    near = clipped * _polynomial(_TANH, clipped * clipped * f32(2 / _TANH_BOUND**2) - f32(1))
    far = f32(1) - f32(2) / (exp(x + x) + f32(1))
    return keep_nan(x, tirx.Select(tirx.abs(x) < f32(_TANH_BOUND), near, far))


def _phi(x: Any) -> Any:
    """Normal distribution function minus one half, for |x| <= 5."""
    clipped = T.bind(tirx.max(tirx.min(x, f32(_PHI_BOUND)), f32(-_PHI_BOUND)))
    return clipped * _polynomial(_PHI, clipped * clipped * f32(2 / _PHI_BOUND**2) - f32(1))


def erf(x: Any) -> Any:
    x = T.bind(x)
    scaled = T.bind(x * f32(math.sqrt(2)))
    value = tirx.Select(
        scaled > f32(_PHI_BOUND), f32(1), tirx.Select(scaled < f32(-_PHI_BOUND), f32(-1), f32(2) * _phi(scaled))
    )
    return keep_nan(x, value)


def gelu(x: Any) -> Any:
    """x Phi(x): twelve multiply-adds, no division and no erf call."""
    x = T.bind(x)
    inner = x * (f32(0.5) + _phi(x))
    return tirx.Select(x > f32(_PHI_BOUND), x, tirx.Select(x < f32(-_PHI_BOUND), f32(0), inner))


def gelu_tanh(x: Any) -> Any:
    """The tanh form, written with one exponential: x sigmoid(2 u)."""
    x = T.bind(x)
    u = f32(math.sqrt(2 / math.pi)) * (x + f32(0.044715) * x * x * x)
    return tirx.Select(x < f32(-20), f32(0), x * sigmoid(u + u))
