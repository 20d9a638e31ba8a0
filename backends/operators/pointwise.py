"""Element-wise operators: each is one expression over the elements of its operands at the same index.

Operands are converted to the type PyTorch computes in. Comparisons and selections are written so that NaN comes out
where PyTorch gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Product, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Expression = Callable[..., Any]
_NARROW = ("float16", "bfloat16")


def element_wise(
    lowering: Lowering, node: Node, arguments: list[Any], expression: Expression, compute: str | None = None
) -> Lazy:
    """`expression` over `arguments` (nodes, numbers) in dtype `compute`, by default the node's own."""
    meta = node.meta["val"]
    dtype = DTYPES[meta.dtype]
    compute = dtype if compute is None else compute
    compute = "float32" if compute in _NARROW else compute
    values = [a if isinstance(a, (int, float, bool)) else lowering.tensor(a) for a in arguments]
    shape = shape_of(meta)
    operands = tuple(v for v in values if isinstance(v, (View, Lazy, Product)))

    def element(kernel: Kernel, index: Index) -> Any:
        loaded = [convert(kernel.load(v, index), compute) if not isinstance(v, (int, float)) else constant(v, compute) for v in values]
        return convert(expression(*loaded), dtype)

    flat = all(o.shape == shape or o.shape == () for o in operands)
    return Lazy(shape, dtype, operands, element, flat)


def convert(value: Any, dtype: str) -> Any:
    """Cast as PyTorch does: any number that is not zero becomes True."""
    have = str(value.ty.dtype)
    if have == dtype:
        return value
    if dtype == "bool":
        return tirx.NE(value, tirx.const(0, have))
    return value.astype(dtype)


def constant(value: float, dtype: str) -> Any:
    return tirx.const(bool(value), "bool") if dtype == "bool" else tirx.const(value, dtype)


def _scalar(lowering: Lowering, argument: Any) -> Any:
    """Sizes used as numbers must be plain by now."""
    value = lowering.value(argument)
    if isinstance(value, (View, Lazy, Product, torch.Tensor, int, float, bool)):
        return argument if isinstance(argument, Node) and not isinstance(value, (int, float, bool)) else value
    return value


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _simple(expression: Expression, arity: int) -> Callable[[Lowering, Node], Lazy]:
    """All operands in the result's dtype."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        return element_wise(lowering, node, _numbers(lowering, node, arity), expression)

    return lower


def _numbers(lowering: Lowering, node: Node, arity: int) -> list[Any]:
    arguments = [_scalar(lowering, argument) for argument in node.args[:arity]]
    for argument in arguments:
        if not isinstance(argument, (Node, int, float, bool)):
            raise CompileError(f"{node.name} computes with the symbolic size {argument}, which has no lowering yet")
    return arguments


def _compare(expression: Expression) -> Callable[[Lowering, Node], Lazy]:
    """Operands in the type they promote to; the result is bool."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        arguments = _numbers(lowering, node, 2)
        dtype = torch.result_type(*(a.meta["val"] if isinstance(a, Node) else a for a in arguments))
        return element_wise(lowering, node, arguments, expression, DTYPES[dtype])

    return lower


def _logical(expression: Expression, arity: int) -> Callable[[Lowering, Node], Lazy]:
    def lower(lowering: Lowering, node: Node) -> Lazy:
        return element_wise(lowering, node, _numbers(lowering, node, arity), expression, "bool")

    return lower


def _predicate(expression: Expression) -> Callable[[Lowering, Node], Lazy]:
    """A test of one float operand; integers are converted, which no test here notices."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        dtype = DTYPES[node.args[0].meta["val"].dtype]  # type: ignore[union-attr]
        return element_wise(lowering, node, [node.args[0]], expression, dtype if _is_float(dtype) else "float64")

    return lower


def _add(sign: int, reverse: bool = False) -> Callable[[Lowering, Node], Lazy]:
    def lower(lowering: Lowering, node: Node) -> Lazy:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        left, right = _numbers(lowering, node, 2)
        left, right = (right, left) if reverse else (left, right)

        def expression(a: Any, b: Any) -> Any:
            b = b if alpha == 1 else b * tirx.const(alpha, str(b.ty.dtype))
            return a + b if sign > 0 else a - b

        return element_wise(lowering, node, [left, right], expression)

    return lower


def _divide(lowering: Lowering, node: Node) -> Lazy:
    mode = node.kwargs.get("rounding_mode")

    def expression(a: Any, b: Any) -> Any:
        if not _is_float(str(a.ty.dtype)):
            return tirx.floordiv(a, b) if mode == "floor" else tirx.truncdiv(a, b)
        return {"floor": tirx.floor, "trunc": tirx.trunc, None: lambda x: x}[mode](a / b)  # type: ignore[no-untyped-call]

    return element_wise(lowering, node, _numbers(lowering, node, 2), expression)


def _remainder(a: Any, b: Any) -> Any:
    return a - tirx.floor(a / b) * b if _is_float(str(a.ty.dtype)) else tirx.floormod(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return tirx.Select(tirx.any(a > b, approximations.is_nan(a)), a, b) if _is_float(str(a.ty.dtype)) else tirx.max(a, b)


def _minimum(a: Any, b: Any) -> Any:
    return tirx.Select(tirx.any(a < b, approximations.is_nan(a)), a, b) if _is_float(str(a.ty.dtype)) else tirx.min(a, b)


def _relu(x: Any) -> Any:
    return tirx.Select(x < zero(x), zero(x), x)


def zero(x: Any) -> Any:
    return tirx.const(0, str(x.ty.dtype))


def one(x: Any) -> Any:
    return tirx.const(1, str(x.ty.dtype))


def _clamp(lowering: Lowering, node: Node) -> Lazy:
    low, high = (list(node.args[1:3]) + [None, None])[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)

    def expression(x: Any, *bounds: Any) -> Any:
        given = iter(bounds)
        if low is not None:
            bound = next(given)
            x = tirx.Select(x < bound, bound, x)
        if high is not None:
            bound = next(given)
            x = tirx.Select(x > bound, bound, x)
        return x

    bounds = [_scalar(lowering, bound) for bound in (low, high) if bound is not None]
    return element_wise(lowering, node, [node.args[0], *bounds], expression)


def _vector(approximation: Expression, exact: Expression) -> Callable[[Lowering, Node], Lazy]:
    """A polynomial in float32 and narrower, the C library's function in float64."""

    def expression(x: Any) -> Any:
        return approximation(x) if str(x.ty.dtype) == "float32" else exact(x)

    return _simple(expression, 1)


def _gelu(lowering: Lowering, node: Node) -> Lazy:
    if node.kwargs.get("approximate", "none") == "tanh":
        return _vector(approximations.gelu_tanh, _gelu_tanh_exact)(lowering, node)
    return _vector(approximations.gelu, lambda x: x * (tirx.erf(x / math.sqrt(2)) + one(x)) * tirx.const(0.5, str(x.ty.dtype)))(lowering, node)


def _gelu_tanh_exact(x: Any) -> Any:
    inner = x * math.sqrt(2 / math.pi) * (one(x) + x * x * 0.044715)
    return x * (tirx.tanh(inner) + one(x)) * 0.5


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


def _sigmoid(x: Any) -> Any:
    return approximations.sigmoid(x) if str(x.ty.dtype) == "float32" else tirx.sigmoid(x)


def _leaky_relu(lowering: Lowering, node: Node) -> Lazy:
    slope = node.args[1] if len(node.args) > 1 else 0.01
    return element_wise(
        lowering, node, [node.args[0]], lambda x: tirx.Select(x > zero(x), x, x * tirx.const(slope, str(x.ty.dtype)))
    )


def _hard_sigmoid(x: Any) -> Any:
    shifted = x + tirx.const(3, str(x.ty.dtype))
    six = tirx.const(6, str(x.ty.dtype))
    clipped = tirx.Select(shifted < zero(x), zero(x), tirx.Select(shifted > six, six, shifted))
    return clipped / six


def _hardtanh(lowering: Lowering, node: Node) -> Lazy:
    low, high = node.args[1:3] if len(node.args) > 2 else (-1.0, 1.0)

    def expression(x: Any) -> Any:
        dtype = str(x.ty.dtype)
        return tirx.Select(x < tirx.const(low, dtype), tirx.const(low, dtype), tirx.Select(x > tirx.const(high, dtype), tirx.const(high, dtype), x))

    return element_wise(lowering, node, [node.args[0]], expression)


def _power(lowering: Lowering, node: Node) -> Lazy:
    """Small whole exponents by multiplication, square roots as such."""
    exponent = lowering.value(node.args[1]) if isinstance(node.args[1], Node) else node.args[1]
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 1 <= exponent <= 4:

        def multiply(x: Any) -> Any:
            result = x
            for _ in range(int(exponent) - 1):
                result = result * x
            return result

        return element_wise(lowering, node, [node.args[0]], multiply)
    if exponent == 0.5:
        return element_wise(lowering, node, [node.args[0]], tirx.sqrt)
    return element_wise(lowering, node, _numbers(lowering, node, 2), tirx.power)


def _where(lowering: Lowering, node: Node) -> Lazy:
    """The condition keeps its own dtype; the choices take the result's."""
    condition, left, right = (_scalar(lowering, argument) for argument in node.args)
    return select(lowering, node, condition, left, right)


def select(lowering: Lowering, node: Node, condition: Any, left: Any, right: Any) -> Lazy:
    meta = node.meta["val"]
    dtype, shape = DTYPES[meta.dtype], shape_of(meta)
    values = [v if isinstance(v, (int, float)) else lowering.tensor(v) for v in (condition, left, right)]
    operands = tuple(v for v in values if not isinstance(v, (int, float)))

    def element(kernel: Kernel, index: Index) -> Any:
        test = convert(kernel.load(values[0], index), "bool")
        chosen = [constant(v, dtype) if isinstance(v, (int, float)) else convert(kernel.load(v, index), dtype) for v in values[1:]]
        return tirx.Select(test, *chosen)

    return Lazy(shape, dtype, operands, element, all(o.shape == shape or o.shape == () for o in operands))


def _masked_fill(lowering: Lowering, node: Node) -> Lazy:
    x, mask, value = node.args
    return select(lowering, node, mask, _scalar(lowering, value), x)


def _cast(lowering: Lowering, node: Node) -> Any:
    """A change of dtype; device and memory format mean nothing here."""
    source = lowering.tensor(node.args[0])
    if source.dtype == DTYPES[node.meta["val"].dtype]:
        return source
    return element_wise(lowering, node, [node.args[0]], lambda x: x, source.dtype)


def _same(lowering: Lowering, node: Node) -> Any:
    return lowering.tensor(node.args[0])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add(1),
    aten.add.Scalar: _add(1),
    aten.sub.Tensor: _add(-1),
    aten.sub.Scalar: _add(-1),
    aten.rsub.Scalar: _add(-1, reverse=True),
    aten.rsub.Tensor: _add(-1, reverse=True),
    aten.mul.Tensor: _simple(lambda a, b: a * b if str(a.ty.dtype) != "bool" else tirx.all(a, b), 2),
    aten.mul.Scalar: _simple(lambda a, b: a * b, 2),
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    aten.floor_divide.default: _simple(lambda a, b: tirx.floor(a / b) if _is_float(str(a.ty.dtype)) else tirx.floordiv(a, b), 2),
    aten.remainder.Scalar: _simple(_remainder, 2),
    aten.remainder.Tensor: _simple(_remainder, 2),
    aten.maximum.default: _simple(_maximum, 2),
    aten.minimum.default: _simple(_minimum, 2),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda lowering, node: element_wise(lowering, node, _numbers(lowering, node, 2), lambda x, high: tirx.Select(x > high, high, x)),
    aten.eq.Scalar: _compare(tirx.EQ),
    aten.eq.Tensor: _compare(tirx.EQ),
    aten.ne.Scalar: _compare(tirx.NE),
    aten.ne.Tensor: _compare(tirx.NE),
    aten.lt.Scalar: _compare(lambda a, b: a < b),
    aten.lt.Tensor: _compare(lambda a, b: a < b),
    aten.le.Scalar: _compare(lambda a, b: a <= b),
    aten.le.Tensor: _compare(lambda a, b: a <= b),
    aten.gt.Scalar: _compare(lambda a, b: a > b),
    aten.gt.Tensor: _compare(lambda a, b: a > b),
    aten.ge.Scalar: _compare(lambda a, b: a >= b),
    aten.ge.Tensor: _compare(lambda a, b: a >= b),
    aten.logical_and.default: _logical(lambda a, b: tirx.all(a, b), 2),
    aten.logical_or.default: _logical(lambda a, b: tirx.any(a, b), 2),
    aten.logical_xor.default: _logical(tirx.NE, 2),
    aten.logical_not.default: _logical(lambda a: tirx.Not(a), 1),
    aten.isnan.default: _predicate(approximations.is_nan),
    aten.isinf.default: _predicate(lambda x: tirx.EQ(tirx.abs(x), tirx.const(math.inf, str(x.ty.dtype)))),
    aten.neg.default: _simple(lambda x: zero(x) - x if not _is_float(str(x.ty.dtype)) else x * tirx.const(-1, str(x.ty.dtype)), 1),
    aten.abs.default: _simple(tirx.abs, 1),
    aten.relu.default: _simple(_relu, 1),
    aten.leaky_relu.default: _leaky_relu,
    aten.hardtanh.default: _hardtanh,
    aten.hardsigmoid.default: _simple(_hard_sigmoid, 1),
    aten.hardswish.default: _simple(lambda x: x * _hard_sigmoid(x), 1),
    aten.exp.default: _vector(approximations.exp, tirx.exp),
    aten.tanh.default: _vector(approximations.tanh, tirx.tanh),
    aten.erf.default: _vector(approximations.erf, tirx.erf),
    aten.sigmoid.default: _simple(_sigmoid, 1),
    aten.silu.default: _simple(_silu, 1),
    aten.gelu.default: _gelu,
    aten.log.default: _simple(tirx.log, 1),
    aten.log2.default: _simple(tirx.log2, 1),
    aten.log1p.default: _simple(lambda x: tirx.log1p(x), 1),
    aten.sqrt.default: _simple(tirx.sqrt, 1),
    aten.rsqrt.default: _simple(lambda x: one(x) / tirx.sqrt(x), 1),
    aten.reciprocal.default: _simple(lambda x: one(x) / x, 1),
    aten.sin.default: _simple(tirx.sin, 1),
    aten.cos.default: _simple(tirx.cos, 1),
    aten.floor.default: _simple(tirx.floor, 1),
    aten.ceil.default: _simple(tirx.ceil, 1),
    aten.round.default: _simple(tirx.nearbyint, 1),
    aten.trunc.default: _simple(tirx.trunc, 1),
    aten.sign.default: _simple(lambda x: tirx.Select(x > zero(x), one(x), tirx.Select(x < zero(x), zero(x) - one(x), x * zero(x))), 1),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.dropout.default: _same,
}

for _and, _or, _xor in ((aten.__and__, aten.__or__, aten.__xor__), (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor)):
    for _overload in ("Tensor", "Scalar"):
        TABLE[getattr(_and, _overload)] = _simple(lambda a, b: tirx.all(a, b) if str(a.ty.dtype) == "bool" else a & b, 2)
        TABLE[getattr(_or, _overload)] = _simple(lambda a, b: tirx.any(a, b) if str(a.ty.dtype) == "bool" else a | b, 2)
        TABLE[getattr(_xor, _overload)] = _simple(lambda a, b: tirx.NE(a, b) if str(a.ty.dtype) == "bool" else a ^ b, 2)
TABLE[aten.bitwise_not.default] = _simple(lambda a: tirx.Not(a) if str(a.ty.dtype) == "bool" else ~a, 1)
