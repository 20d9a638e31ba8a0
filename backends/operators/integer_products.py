"""graphopt::qlinear and graphopt::qconv: exact sums of products of codes, with everything after them in one kernel.

Weights and all scales and zero points are constants. Sums run over the codes as they are stored; that the zero point
of the activations is not 0 costs one constant an output, -zero_point * (sum of its weights), added with the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import Code, int64
from graphopt.backends.operators.activations import FUNCTIONS
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, like
from graphopt.backends.operators.linear import on_tiles
from graphopt.backends.operators.shifted_weights import Missing, Shifted, missing_of_rows
from graphopt.backends.rules import amx_gemm
from graphopt.backends.rules.code_stores import before_clip
from graphopt.backends.rules.gemm import Configuration
from graphopt.backends.rules.integer_gemm import Words, integer_gemm, offer, pack_words, words_of
from graphopt.backends.values import Index, Lazy, Product, Value, View
from graphopt.errors import CompileError
from graphopt.operators.requantization import Factors, Requantization

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

_WHOLE = 2.0**30  # numbers below are an int32 after rounding, with a zero point added too
FURTHEST = 255  # codes lie from their zero point at most
_CONSTANTS = (
    *("x_scale", "x_zero_point", "weight", "weight_scale", "bias", "scale", "zero_point"),
    *("residual_scale", "residual_zero_point"),
)


@dataclass(frozen=True, eq=False)
class Call:
    """A product of codes: its constants, and the residual as a value; `shifted` is what kernels multiply."""

    x: Any
    zero: int
    weight: Tensor
    shifted: Shifted
    bias: Tensor | None
    factors: Factors
    into: Requantization
    residual: Value | None
    residual_zero: int

    @staticmethod
    def of(lowering: Lowering, node: Node) -> Call:
        given = arguments(node)
        held = constants(lowering, node, _CONSTANTS)
        into = Requantization(
            held["scale"],
            held["zero_point"],
            *(given[name] for name in ("activation", "qmin", "qmax", "dtype", "reciprocal")),
        )
        bias = held["bias"]
        factors = Factors.of(held["x_scale"], held["weight_scale"], bias, held["residual_scale"], into)
        return Call(
            given["x"],
            zero_of(held["x_zero_point"]),
            held["weight"],
            Shifted.of(held["weight"]),
            None if bias is None or bias.is_floating_point() else bias,
            factors,
            into,
            None if given["residual"] is None else lowering.tensor(given["residual"]),
            zero_of(held["residual_zero_point"]),
        )


def constants(lowering: Lowering, node: Node, names: Sequence[str]) -> dict[str, Any]:
    """The tensors that these arguments are, None where there is none. Raises CompileError for one that is computed."""
    given = arguments(node)
    held = {name: None if given[name] is None else lowering.value(given[name]) for name in names}
    for name, value in held.items():
        if value is not None and not isinstance(value, Tensor):
            raise CompileError(f"the {name} of {node.name} is computed, which has no lowering; make it a constant")
    return held


def zero_of(zero: Tensor | None) -> int:
    return 0 if zero is None else int(zero)


def _linear(lowering: Lowering, node: Node) -> View:
    call, words = Call.of(lowering, node), words_of(lowering.target)
    value, zero = stored_codes(lowering.tensor(call.x), call.zero, words)
    codes, shift = call.shifted.codes, call.shifted.shift
    missing = None
    if shift is not None:
        value = lowering.view(value)
        missing = missing_of_rows(lowering, shift, value, zero)
    a = in_whole_words(lowering, value, words.codes)
    n, k = codes.shape
    begin = ending(lowering, call, codes, zero, -1, missing)
    return packed_integer_product(lowering, node, a, codes, begin, f"qlinear_{n}x{k}")


def packed_integer_product(
    lowering: Lowering,
    node: Node,
    a: View,
    weight: Tensor,
    begin: Callable[[Any], Any],
    name: str,
    order: tuple[int, ...] = (),
) -> View:
    """a [..., K] in whole words times weight [N, K] of codes with the node's epilogue; `begin`, `order`: `anchored`."""
    target, words = lowering.target, words_of(lowering.target)
    if amx_gemm.fits(target, a):
        return lowering.anchored(node, on_tiles(lowering, a, weight, name), begin, order, sums="int32")

    def build(result: Product, end: Any) -> Code:
        def write(choice: Configuration) -> Code:
            columns = choice.tile.vectors * target.lanes
            key = f"words{words.codes}x{columns}"
            b = lowering.weight(weight, key, lambda array: pack_words(array, columns, words))
            return integer_gemm(a, b, result, end, name, target, choice)

        return lowering.choose(offer(target, a, int(weight.shape[0]), end, write))

    return lowering.anchored(node, build, begin, order, sums="int32")


def stored_codes(value: Value, zero: int, words: Words) -> tuple[Value, int]:
    """The codes in the type that `words` multiply, and the zero point that is left to subtract from them."""
    if value.dtype == words.activations:
        return value, zero
    shift = {"uint8": 128, "int8": -128}.get(words.activations, -zero)

    def element(kernel: Kernel, index: Index) -> Any:
        code = kernel.load(value, index).astype("int32")
        return convert(code + like(code, shift), words.activations)

    return Lazy(value.shape, words.activations, (value,), element, flat=True, name="shift"), zero + shift


def in_whole_words(lowering: Lowering, value: Value, codes: int) -> View:
    """In memory with a last axis of whole words of `codes`, to which it is padded with anything."""
    width = int(value.shape[-1])
    if width % codes:
        value = _widened(value, width + -width % codes)
    if isinstance(value, View) and value.strides[-1] == 1:
        steps = (*value.strides[:-1], value.offset)
        if all(isinstance(step, int) and step % codes == 0 for step in steps):
            return value
    return lowering.contiguous(value)


def to_words(filters: Tensor, words: Words) -> Tensor:
    """Filters [O, C, KH, KW] with channels up to whole words that are zero."""
    missing = -int(filters.shape[1]) % words.codes
    return torch.nn.functional.pad(filters, (0, 0, 0, 0, 0, missing)) if missing else filters


def _widened(value: Value, width: int) -> Lazy:
    """The last axis with zeros behind it."""
    last = int(value.shape[-1])

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(value.shape))]
        at = Index(value.shape, kernel.sizes, axes=(*axes[:-1], tirx.min(axes[-1], int64(last - 1))))
        code = kernel.load(value, at)
        return tirx.Select(axes[-1] < last, code, like(code, 0))

    return Lazy((*value.shape[:-1], width), value.dtype, (value,), element, name="pad")


def ending(
    lowering: Lowering, call: Call, weight: Tensor, zero: int, axis: int, missing: Missing | None = None
) -> Callable[[Any], Lazy]:
    """From int32 sums of stored codes, less `zero` each, to the node's result: numbers or codes of it.

    `weight` is what codes were multiplied by, `missing` what is added where that is not the call's. `axis` is that of
    the outputs.
    """
    sums = weight.flatten(1).to(torch.int64).sum(1) * -zero
    total = sums if call.bias is None else sums + call.bias
    offset = lowering.weight(total.to(torch.int32)) if bool((total != 0).any()) else None
    factors, into = call.factors, call.into
    factor = lowering.weight(factors.product) if factors.product.ndim else float(factors.product)
    bias = None if factors.bias is None else lowering.weight(factors.bias)
    dtype, name = DTYPES[into.dtype], "dequantize" if into.scale is None else "requantize"
    largest = _largest(call) if into.activation is None else math.inf

    def begin(result: Any) -> Lazy:
        def element(kernel: Kernel, index: Index) -> Any:
            output = index.axis(axis % len(result.shape))

            def each(value: Any) -> Any:
                return kernel.flat(value.storage)[output] if isinstance(value, View) else tirx.const(value, "float32")

            number = kernel.load(result, index)
            number = number if offset is None else number.astype("int32") + each(offset)
            number = number if missing is None else number + missing.at(kernel, index)
            number = number.astype("float32") * each(factor)
            number = number if bias is None else number + each(bias)
            if call.residual is not None:
                added = kernel.load(call.residual, index).astype("int32")
                added = (added - like(added, call.residual_zero)).astype("float32")
                number = number + added * like(number, float(factors.residual))  # type: ignore[arg-type]
            if into.activation is not None:
                number = _in_steps(FUNCTIONS[into.activation](T.bind(number)), into)
            return number if into.scale is None else convert(codes_of(number, into, largest), dtype)

        given = (offset, factor, bias, call.residual, *((missing.shift, missing.sums) if missing else ()))
        read = [value for value in given if isinstance(value, (View, Lazy))]
        words = [name if into.activation is None else f"{into.activation.replace('-', '_')}_{name}"]
        words += [] if call.residual is None else ["add"]
        return Lazy(result.shape, dtype, (result, *read), element, name="_".join(reversed(words)))

    return begin


def _largest(call: Call) -> float:
    """A bound of the numbers that stand for sums which do not wrap around, in steps of the result's scale."""
    sums = call.weight.flatten(1).double().abs().sum(1) * FURTHEST
    sums = sums if call.bias is None else sums + call.bias.double().abs()
    factors = call.factors
    number = torch.clamp(sums, max=2.0**31) * factors.product.double()
    number = number if factors.bias is None else number + factors.bias.abs()
    number = number if factors.residual is None else number + FURTHEST * factors.residual
    return float(number.max()) if bool(number.isfinite().all()) else math.inf


def _in_steps(number: Any, into: Requantization) -> Any:
    if into.scale is None:
        return number
    scale = into.scale.float()
    if into.reciprocal:
        return number * like(number, float(scale.reciprocal()))
    return number / like(number, float(scale))


def codes_of(number: Any, into: Requantization, largest: float = math.inf) -> Any:
    """Codes as int32; `tirx.round` rounds halves to even. `largest` bounds the number, which is finite then.

    Rounding keeps order and bounds are whole, so that a number that int32 may not hold is clipped before.
    """
    zero = into.zero
    if largest < _WHOLE:
        whole = tirx.round(number).astype("int32")
        return clipped(whole + like(whole, zero) if zero else whole, into.qmin, into.qmax)
    return rounded_between(number, into.qmin - zero, into.qmax - zero) + tirx.const(zero, "int32")


def rounded_between(number: Any, low: int, high: int) -> Any:
    """The nearest int32 from `low` to `high`, halves to even; `low` for NaN."""
    least, most = like(number, low), like(number, high)
    number = tirx.Select(number > least, number, least)
    return tirx.round(tirx.Select(number < most, number, most)).astype("int32")


def number_of(code: Any, zero: int) -> Any:
    """code - zero in float32. Where the code has just been rounded it has not been an integer at all."""
    inner, bounds = before_clip(code)
    origin, cast = 0, inner
    if isinstance(inner, tirx.Add) and isinstance(inner.b, tirx.IntImm):
        origin, cast = int(inner.b.value), inner.a
    if isinstance(cast, tirx.Cast) and getattr(getattr(cast.value, "op", None), "name", "") == "tirx.round":
        low, high = (like(cast.value, bound - origin) for bound in bounds)
        whole = T.bind(cast.value)
        whole = T.bind(tirx.Select(whole > low, whole, low))
        whole = tirx.Select(whole < high, whole, high)
        return whole + like(whole, origin - zero) if origin != zero else whole
    whole = code.astype("int32")
    return (whole - like(whole, zero) if zero else whole).astype("float32")


def clipped(whole: Any, low: int, high: int) -> Any:
    return tirx.min(tirx.max(whole, like(whole, low)), like(whole, high))


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.qlinear.default: _linear,
}
