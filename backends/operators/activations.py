"""Functions of one float: activations, exponentials, roots and trigonometry.

float32 and narrower take the polynomials of `approximations` where there is one, float64 the C library's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import Expression, dtype_of, element_wise, library, like
from graphopt.backends.operators.pointwise import simple
from graphopt.backends.values import Lazy

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _either(approximation: Expression, exact: Expression) -> Expression:
    """The polynomial in float32, the exact form in float64."""
    return lambda x: approximation(x) if dtype_of(x) == "float32" else exact(x)


def _gelu_exact(x: Any) -> Any:
    return x * like(x, 0.5) * (like(x, 1) + library("erf")(x * like(x, math.sqrt(0.5))))


def _gelu_tanh_exact(x: Any) -> Any:
    inner = like(x, math.sqrt(2 / math.pi)) * (x + like(x, 0.044715) * x * x * x)
    return x * like(x, 0.5) * (like(x, 1) + library("tanh")(inner))


_exp = _either(approximations.exp, tirx.exp)
tanh = _either(approximations.tanh, library("tanh"))
sigmoid = _either(approximations.sigmoid, lambda x: like(x, 1) / (like(x, 1) + tirx.exp(like(x, 0) - x)))
_erf = _either(approximations.erf, library("erf"))
_log1p = library("log1p")
_LIBRARY = ("tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh")
_GELU = {
    "none": _either(approximations.gelu, _gelu_exact),
    "tanh": _either(approximations.gelu_tanh, _gelu_tanh_exact),
}


def _gelu(lowering: Lowering, node: Node) -> Lazy:
    x, form = arguments(node).values()
    return element_wise(lowering, node, [x], _GELU[form])


def relu(x: Any) -> Any:
    return tirx.Select(x < like(x, 0), like(x, 0), x)


def _with_options(expression: Expression) -> Callable[[Lowering, Node], Lazy]:
    """expression(x, *options): the options are numbers known at compile time."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        x, *options = arguments(node).values()
        return element_wise(lowering, node, [x], lambda value: expression(value, *options))

    return lower


def _leaky_relu(x: Any, slope: float) -> Any:
    return tirx.Select(x > like(x, 0), x, x * like(x, slope))


def _prelu(lowering: Lowering, node: Node) -> Lazy:
    x, slope = arguments(node).values()
    return element_wise(lowering, node, [x, slope], lambda x, s: tirx.Select(x > like(x, 0), x, x * s))


def bounded(x: Any, low: float, high: float) -> Any:
    return tirx.Select(x < like(x, low), like(x, low), tirx.Select(x > like(x, high), like(x, high), x))


def _hard_sigmoid(x: Any) -> Any:
    return bounded(x + like(x, 3), 0, 6) / like(x, 6)


def _hard_swish(x: Any) -> Any:
    """Multiplied first, as PyTorch does: it overflows where PyTorch's does."""
    return x * bounded(x + like(x, 3), 0, 6) / like(x, 6)


def _elu(x: Any, alpha: float, scale: float, input_scale: float) -> Any:
    low = like(x, alpha * scale) * library("expm1")(x * like(x, input_scale))
    return tirx.Select(x > like(x, 0), x * like(x, scale), low)


def softplus(x: Any, beta: float, threshold: float) -> Any:
    scaled = x * like(x, beta)
    return tirx.Select(scaled > like(x, threshold), x, _log1p(_exp(scaled)) / like(x, beta))


def _log_sigmoid(x: Any) -> Any:
    """min(x, 0) - log(1 + e^-|x|); NaN stays."""
    return tirx.Select(x > like(x, 0), like(x, 0), x) - _log1p(_exp(like(x, 0) - tirx.abs(x)))


def threshold(x: Any, bound: float, value: float) -> Any:
    return tirx.Select(x <= like(x, bound), like(x, value), x)


def _nan_to_num(lowering: Lowering, node: Node) -> Lazy:
    """NaN to `nan` or 0, infinities to the given numbers or the largest finite ones."""
    x, nan, high, low = arguments(node).values()
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return element_wise(lowering, node, [x], lambda value: value)
    limit = torch.finfo(dtype).max
    high, low = limit if high is None else high, -limit if low is None else low

    def expression(value: Any) -> Any:
        finite = tirx.Select(tirx.EQ(value, like(value, -math.inf)), like(value, low), value)
        finite = tirx.Select(tirx.EQ(value, like(value, math.inf)), like(value, high), finite)
        return tirx.Select(approximations.is_nan(value), like(value, nan or 0.0), finite)

    return element_wise(lowering, node, [x], expression)


def _silu(x: Any) -> Any:
    return x * sigmoid(x)


FUNCTIONS: dict[str, Expression] = {
    "gelu": _GELU["none"],
    "gelu-tanh": _GELU["tanh"],
    "silu": _silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "hardswish": _hard_swish,
    "hardsigmoid": _hard_sigmoid,
}
"""As the operators of integer products name them."""


def _unary(expression: Expression) -> Callable[[Lowering, Node], Lazy]:
    return simple(expression, 1)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.relu.default: _unary(relu),
    aten.relu6.default: _unary(lambda x: bounded(x, 0, 6)),
    aten.leaky_relu.default: _with_options(_leaky_relu),
    aten.prelu.default: _prelu,
    aten._prelu_kernel.default: _prelu,
    aten.elu.default: _with_options(_elu),
    aten.softplus.default: _with_options(softplus),
    aten.threshold.default: _with_options(threshold),
    aten.hardtanh.default: _with_options(bounded),
    aten.hardsigmoid.default: _unary(_hard_sigmoid),
    aten.hardswish.default: _unary(_hard_swish),
    aten.silu.default: _unary(_silu),
    aten.mish.default: _unary(lambda x: x * tanh(softplus(x, 1, 20))),
    aten.log_sigmoid.default: _unary(_log_sigmoid),
    aten.gelu.default: _gelu,
    aten.sigmoid.default: _unary(sigmoid),
    aten.exp.default: _unary(_exp),
    aten.exp2.default: _unary(tirx.exp2),
    aten.expm1.default: _unary(library("expm1")),
    aten.tanh.default: _unary(tanh),
    aten.erf.default: _unary(_erf),
    aten.log.default: _unary(tirx.log),
    aten.log2.default: _unary(tirx.log2),
    aten.log10.default: _unary(tirx.log10),
    aten.log1p.default: _unary(_log1p),
    aten.sqrt.default: _unary(tirx.sqrt),
    aten.rsqrt.default: _unary(lambda x: like(x, 1) / tirx.sqrt(x)),
    aten.square.default: _unary(lambda x: x * x),
    aten.reciprocal.default: _unary(lambda x: like(x, 1) / x),
    aten.sin.default: _unary(tirx.sin),
    aten.cos.default: _unary(tirx.cos),
    **{getattr(aten, name).default: _unary(library(name)) for name in _LIBRARY},
    aten.nan_to_num.default: _nan_to_num,
}
