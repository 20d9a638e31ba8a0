"""Arithmetic, comparisons, logic, selection and casts.

Comparisons and selections are written so that NaN comes out where PyTorch gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import tvm
from torch.fx import Node
from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import (
    Expression,
    cast,
    dtype_of,
    element_wise,
    is_float,
    library,
    like,
    not_equal,
)
from graphopt.backends.operators.widening import PRODUCTS, is_widening
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Lazy
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[..., Any]


def simple(expression: Expression, arity: int) -> Lower:
    """The first `arity` arguments, all in the result's dtype."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        return element_wise(lowering, node, list(arguments(node).values())[:arity], expression)

    return lower


def _alike(expression: Expression) -> Lower:
    """Two arguments, of which a number is rounded to the result's dtype before anything is computed."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        pair = [_rounded(a, node.meta["val"].dtype) for a in arguments(node).values()]
        return element_wise(lowering, node, pair, expression)

    return lower


def in_dtype(compute: str, expression: Expression, arity: int) -> Lower:
    """The first `arity` arguments converted to `compute`."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        return element_wise(lowering, node, list(arguments(node).values())[:arity], expression, compute)

    return lower


def _compare(expression: Expression) -> Lower:
    """Operands in the type they promote to; the result is bool."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        pair = list(arguments(node).values())
        values = [a.meta["val"] if isinstance(a, Node) else a for a in pair]
        dtype = torch.result_type(*(v if isinstance(v, torch.Tensor) else _example(v) for v in values))
        if dtype.is_floating_point:  # a number is rounded to the dtype the comparison is made in
            pair = [_rounded(a, dtype) for a in pair]
        return element_wise(lowering, node, pair, expression, "uint8" if dtype is torch.bool else DTYPES[dtype])

    return lower


def _rounded(argument: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(argument, dtype=dtype).item() if isinstance(argument, (int, float)) else argument


def _example(number: Any) -> Any:
    """A number of the same kind as a possibly symbolic one: promotion looks at nothing else."""
    if isinstance(number, torch.SymInt):
        return 1
    return 1.0 if isinstance(number, torch.SymFloat) else number


def _predicate(expression: Expression) -> Lower:
    """A test of one operand in its own dtype; integers are tested as float64, which no test here notices."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        dtype = DTYPES[node.args[0].meta["val"].dtype]  # type: ignore[union-attr]
        return element_wise(lowering, node, [node.args[0]], expression, dtype if is_float(dtype) else "float64")

    return lower


def _by_kind(of_float: Expression, of_integer: Expression, of_bool: Expression | None = None) -> Expression:
    """One expression for each kind of dtype."""

    def expression(first: Any, *others: Any) -> Any:
        dtype = dtype_of(first)
        if dtype == "bool" and of_bool is not None:
            return of_bool(first, *others)
        return (of_float if is_float(dtype) else of_integer)(first, *others)

    return expression


def add(a: Any, b: Any) -> Any:
    return tirx.any(a, b) if dtype_of(a) == "bool" else a + b


def _add(sign: int, reverse: bool = False) -> Lower:
    def lower(lowering: Lowering, node: Node) -> Lazy:
        left, right, alpha = arguments(node).values()
        left, right = (right, left) if reverse else (left, right)

        def expression(a: Any, b: Any) -> Any:
            b = b if alpha == 1 else b * like(b, alpha)
            return add(a, b) if sign > 0 else subtract(a, b)

        return element_wise(lowering, node, [left, right], expression)

    return lower


def subtract(a: Any, b: Any) -> Any:
    """TVM takes x - x for 0 and (x + 1) - x for 1, which they are not for NaN, infinities and large numbers.

    It leaves a + (-b) alone, and LLVM makes one subtraction of it.
    """
    if not is_float(dtype_of(a)) or isinstance(a, tirx.FloatImm) or isinstance(b, tirx.FloatImm):
        return a - b
    return a + b * like(b, -1)


def multiply(a: Any, b: Any) -> Any:
    if dtype_of(a) == "bool":
        return tirx.all(a, b)
    for number, other in ((a, b), (b, a)):
        if isinstance(number, tirx.FloatImm) and float(number.value) == 0.0:
            return _times_zero(other, math.copysign(1.0, float(number.value)) < 0)
    return a * b


def _is_negative(x: Any) -> Any:
    """Whether the sign is set, of zeros too."""
    return tirx.any(x < like(x, 0), like(x, 1) / x < like(x, 0))


def _times_zero(x: Any, negative: bool) -> Any:
    """x * 0, which TVM takes for 0: NaN stays, infinities become NaN, and the sign is that of the product."""
    sign = -math.inf if negative else math.inf
    signed = like(x, 1) / tirx.Select(_is_negative(x), like(x, -sign), like(x, sign))  # to TVM, -0.0 and 0.0 are one
    return tirx.Select(tirx.abs(x) < like(x, math.inf), signed, like(x, math.nan))


def divide(a: Any, b: Any) -> Any:
    """a / b; of 0 / b by way of 1 / b, since TVM takes it for 0."""
    return multiply(a, like(b, 1) / b) if isinstance(a, tirx.FloatImm) and float(a.value) == 0.0 else a / b


def _divide(lowering: Lowering, node: Node) -> Lazy:
    left, right, *mode = arguments(node).values()
    forms = {None: divide, "floor": _floor_divide, "trunc": _truncating_divide}
    return element_wise(lowering, node, [left, right], forms[mode[0] if mode else None])


def _whole(function: Callable[[Any, Any], Any], of_minus_one: Callable[[Any], Any]) -> Expression:
    """Integer division that never traps: x / 0 is 0 (PyTorch raises), and the lowest number / -1 wraps around."""

    def expression(a: Any, b: Any) -> Any:
        if isinstance(b, tirx.IntImm) and int(b) not in (0, -1):
            return function(a, b)
        signed = not dtype_of(b).startswith("u")
        traps = tirx.EQ(b, like(b, 0))
        traps = tirx.any(traps, tirx.EQ(b, like(b, -1))) if signed else traps
        result = function(a, tirx.Select(traps, like(b, 1), b))
        if signed:
            result = tirx.Select(tirx.EQ(b, like(b, -1)), of_minus_one(a), result)
        return tirx.Select(tirx.EQ(b, like(b, 0)), like(a, 0), result)

    return expression


def _negated(a: Any) -> Any:
    return like(a, 0) - a


_fmod = library("fmod")


def _remainder_of_floats(a: Any, b: Any) -> Any:
    """The C remainder moved to the divisor's sign."""
    rest = _fmod(a, b)
    zero = like(a, 0)
    return tirx.Select(tirx.all(tirx.NE(rest, zero), not_equal(b < zero, rest < zero)), rest + b, rest)


def _floor_of_floats(a: Any, b: Any) -> Any:
    """Through the remainder, since a / b may round up to the next whole number."""
    zero = like(a, 0)
    rest = _fmod(a, b)
    quotient = subtract(a, rest) / b
    lower = tirx.all(tirx.NE(rest, zero), not_equal(b < zero, rest < zero))
    quotient = tirx.Select(lower, quotient - like(a, 1), quotient)
    below = tirx.floor(quotient)
    rounded = tirx.Select(quotient - below > like(a, 0.5), below + like(a, 1), below)
    rounded = tirx.Select(tirx.EQ(quotient, zero), _times_zero(a / b, False), rounded)  # zeros have the sign of a / b
    return tirx.Select(tirx.EQ(b, zero), a / b, rounded)


_floor_divide = _by_kind(_floor_of_floats, _whole(tirx.floordiv, _negated))
_truncating_divide = _by_kind(lambda a, b: tirx.trunc(a / b), _whole(tirx.truncdiv, _negated))
_remainder = _by_kind(_remainder_of_floats, _whole(tirx.floormod, lambda a: like(a, 0)))
_truncating_remainder = _by_kind(_fmod, _whole(tirx.truncmod, lambda a: like(a, 0)))


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN where either is NaN."""
    if dtype_of(a) == "bool":
        return tirx.any(a, b)
    return tirx.Select(tirx.any(a > b, approximations.is_nan(a)), a, b) if is_float(dtype_of(a)) else tirx.max(a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN where either is NaN."""
    if dtype_of(a) == "bool":
        return tirx.all(a, b)
    return tirx.Select(tirx.any(a < b, approximations.is_nan(a)), a, b) if is_float(dtype_of(a)) else tirx.min(a, b)


def _clamp(lowering: Lowering, node: Node) -> Lazy:
    """clamp with one or two bounds; where they cross, the upper one wins."""
    given = arguments(node)
    low, high = given.get("min"), given.get("max")

    def expression(x: Any, *bounds: Any) -> Any:
        pending = iter(bounds)
        if low is not None:
            x = maximum(x, next(pending))
        return x if high is None else minimum(x, next(pending))

    return element_wise(lowering, node, [given["self"], *(b for b in (low, high) if b is not None)], expression)


def _power(lowering: Lowering, node: Node) -> Lazy:
    """Whole exponents by multiplication, square roots as such, the rest by the C library."""
    base, exponent = arguments(node).values()
    number = lowering.value(exponent)
    if isinstance(number, torch.Tensor) and number.dim() == 0:
        number = number.item()
    whole = isinstance(number, (int, float)) and number == int(number) and abs(number) <= 64
    if whole and (number >= 0 or node.meta["val"].dtype.is_floating_point):
        return element_wise(lowering, node, [base], lambda x: whole_power(x, int(number)))
    if not node.meta["val"].dtype.is_floating_point:
        raise CompileError(f"{node.name} raises integers to a power that varies; convert them to float first")
    has_roots = node.meta["val"].dtype is not torch.float16  # PyTorch takes none there
    if has_roots and isinstance(number, float) and number in (0.5, -0.5):
        roots = {0.5: tirx.sqrt, -0.5: lambda x: like(x, 1) / tirx.sqrt(x)}
        return element_wise(lowering, node, [base], roots[number])
    return element_wise(lowering, node, [base, exponent], tirx.power)


def whole_power(x: Any, exponent: int) -> Any:
    """By repeated squaring."""
    result, square, left = None, x, abs(exponent)
    while left:
        if left % 2:
            result = square if result is None else result * square
        square, left = square * square, left // 2
    result = like(x, 1) if result is None else result
    return like(x, 1) / result if exponent < 0 else result


def _where(lowering: Lowering, node: Node) -> Lazy:
    condition, left, right = arguments(node).values()
    return element_wise(lowering, node, [condition, left, right], tirx.Select, ["bool", None, None])


def _masked_fill(lowering: Lowering, node: Node) -> Lazy:
    x, mask, value = arguments(node).values()
    return element_wise(lowering, node, [mask, value, x], tirx.Select, ["bool", None, None])


def _multiply_add(lowering: Lowering, node: Node) -> Lazy:
    """addcmul: x + value a b."""
    x, a, b, value = arguments(node).values()
    return element_wise(lowering, node, [x, a, b], lambda x, a, b: x + like(x, value) * a * b)


def _lerp(start: Any, end: Any, weight: Any) -> Any:
    """From the nearer end, as PyTorch does."""
    distance = subtract(end, start)
    return tirx.Select(
        tirx.abs(weight) < like(weight, 0.5), start + weight * distance, end - distance * (like(weight, 1) - weight)
    )


def _negate(x: Any) -> Any:
    """-0.0 from 0.0, hence no subtraction."""
    return x * like(x, -1) if is_float(dtype_of(x)) else like(x, 0) - x


def _absolute(x: Any) -> Any:
    return x if dtype_of(x).startswith("u") else tirx.abs(x)


def _sign(x: Any) -> Any:
    """1, 0 or -1; 0 for NaN, as in PyTorch."""
    dtype, zero = dtype_of(x), like(x, 0)
    return x if dtype == "bool" else tirx.Select(x > zero, like(x, 1), tirx.Select(x < zero, like(x, -1), zero))


def _rounding(function: Expression) -> Lower:
    """Integers are whole already."""
    return simple(lambda x: function(x) if is_float(dtype_of(x)) else x, 1)


def _cast(lowering: Lowering, node: Node) -> Any:
    """A change of dtype; device and memory format mean nothing here."""
    value = lowering.value(node.args[0])
    if isinstance(value, torch.Tensor) and is_widening(node) and all(user.target in PRODUCTS for user in node.users):
        return value  # which is packed as it is
    return cast(lowering.tensor(node.args[0]), DTYPES[node.meta["val"].dtype])


def _same(lowering: Lowering, node: Node) -> Any:
    return lowering.tensor(node.args[0])


def _dropout(lowering: Lowering, node: Node) -> Any:
    x, probability, train = arguments(node).values()
    if train and probability:
        raise CompileError(f"{node.name} is a dropout in training mode; capture the model in eval mode")
    return lowering.tensor(x)


def _native_dropout(lowering: Lowering, node: Node) -> tuple[Any, Lazy]:
    """The tensor as it is and a mask that keeps everything."""
    kept = Lazy(shape_of(node.meta["val"][1]), "bool", (), lambda kernel, index: tirx.const(True, "bool"))
    return _dropout(lowering, node), kept


def _bitwise(on_flags: Expression, on_integers: Expression) -> Lower:
    return simple(_by_kind(on_integers, on_integers, on_flags), 2)


def _shift(left: bool) -> Expression:
    """By as many places as the dtype has, or more, or less than none: 0, to the right the sign."""

    def expression(a: Any, places: Any) -> Any:
        dtype = dtype_of(a)
        most = like(places, tvm.DataType(dtype).bits - 1)
        inside = tirx.all(places >= like(places, 0), places <= most)
        kept = tirx.Select(inside, places, most)
        shifted = a << kept if left else a >> kept
        signed = not dtype.startswith("u")
        return shifted if signed and not left else tirx.Select(inside, shifted, like(a, 0))

    return expression


_LEFT, _RIGHT = simple(_shift(left=True), 2), simple(_shift(left=False), 2)
_COMPARISONS: dict[str, Expression] = {
    "eq": lambda a, b: tirx.Not(not_equal(a, b)) if is_float(dtype_of(a)) else tirx.EQ(a, b),
    "ne": not_equal,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}

_BITWISE: dict[str, Lower] = {
    "and": _bitwise(tirx.all, lambda a, b: a & b),
    "or": _bitwise(tirx.any, lambda a, b: a | b),
    "xor": _bitwise(not_equal, lambda a, b: a ^ b),
}


def _overloads(packets: dict[Any, Lower], *names: str) -> dict[Any, Lower]:
    """One row for each named overload of each operator."""
    return {getattr(packet, name): lower for packet, lower in packets.items() for name in names}


TABLE: dict[Any, Lower] = {
    **_overloads({aten.add: _add(1), aten.sub: _add(-1), aten.rsub: _add(-1, reverse=True)}, "Tensor", "Scalar"),
    **_overloads({aten.mul: simple(multiply, 2)}, "Tensor", "Scalar"),
    **_overloads({aten.div: _divide}, "Tensor", "Scalar", "Tensor_mode", "Scalar_mode"),
    **_overloads({aten.floor_divide: _alike(_floor_divide)}, "default", "Scalar"),
    **_overloads({aten.remainder: _alike(_remainder)}, "Tensor", "Scalar"),
    **_overloads({aten.fmod: _alike(_truncating_remainder)}, "Tensor", "Scalar"),
    **_overloads({aten.maximum: simple(maximum, 2), aten.minimum: simple(minimum, 2)}, "default"),
    **_overloads({aten.max: simple(maximum, 2), aten.min: simple(minimum, 2)}, "other"),
    **_overloads({aten.pow: _power}, "Tensor_Scalar", "Tensor_Tensor", "Scalar"),
    **_overloads(
        {aten.clamp: _clamp, aten.clip: _clamp, aten.clamp_min: _clamp, aten.clamp_max: _clamp}, "default", "Tensor"
    ),
    **_overloads({getattr(aten, n): _compare(e) for n, e in _COMPARISONS.items()}, "Tensor", "Scalar"),
    **_overloads({getattr(aten, f"__{n}__"): lower for n, lower in _BITWISE.items()}, "Tensor", "Scalar"),
    **_overloads({getattr(aten, f"bitwise_{n}"): lower for n, lower in _BITWISE.items()}, "Tensor", "Scalar"),
    **_overloads({aten.where: _where}, "self", "ScalarOther", "ScalarSelf", "Scalar"),
    **_overloads({aten.masked_fill: _masked_fill}, "Scalar", "Tensor"),
    **_overloads({aten.to: _cast}, "dtype", "dtype_layout", "device"),
    **_overloads({aten.bitwise_left_shift: _LEFT, aten.bitwise_right_shift: _RIGHT}, "Tensor", "Tensor_Scalar"),
    **_overloads({aten.__lshift__: _LEFT, aten.__rshift__: _RIGHT}, "Tensor", "Scalar"),
    aten.bitwise_not.default: simple(lambda a: tirx.Not(a) if dtype_of(a) == "bool" else ~a, 1),
    aten.logical_and.default: in_dtype("bool", tirx.all, 2),
    aten.logical_or.default: in_dtype("bool", tirx.any, 2),
    aten.logical_xor.default: in_dtype("bool", not_equal, 2),
    aten.logical_not.default: in_dtype("bool", tirx.Not, 1),
    aten.isnan.default: _predicate(approximations.is_nan),
    aten.isinf.default: _predicate(lambda x: tirx.EQ(tirx.abs(x), like(x, float("inf")))),
    aten.isfinite.default: _predicate(lambda x: tirx.abs(x) < like(x, float("inf"))),
    aten.signbit.default: _predicate(_is_negative),
    aten.addcmul.default: _multiply_add,
    aten.atan2.default: simple(library("atan2"), 2),
    aten.copy.default: lambda lowering, node: element_wise(lowering, node, [node.args[1]], lambda x: x),
    aten.lerp.Scalar: simple(_lerp, 3),
    aten.lerp.Tensor: simple(_lerp, 3),
    aten.neg.default: simple(_negate, 1),
    aten.abs.default: simple(_absolute, 1),
    aten.sign.default: simple(_sign, 1),
    aten.floor.default: _rounding(tirx.floor),
    aten.ceil.default: _rounding(tirx.ceil),
    aten.round.default: _rounding(tirx.nearbyint),
    aten.trunc.default: _rounding(tirx.trunc),
    aten.frac.default: simple(lambda x: x - tirx.trunc(x), 1),
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _native_dropout,
}
