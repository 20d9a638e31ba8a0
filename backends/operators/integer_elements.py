"""graphopt::qadd, qmul, qdiv and table256 as element-wise expressions, and graphopt::qmatmul of two computed tensors.

`qmatmul` of matrices is a product of integers of its own; vectors and depths known at run time take the generic kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import Code
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, element_wise, like
from graphopt.backends.operators.integer_products import (
    FURTHEST,
    codes_of,
    constants,
    number_of,
    stored_codes,
    zero_of,
)
from graphopt.backends.rules import integer_batched_gemm
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.rules.integer_batched_gemm import Operands
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Product, Value
from graphopt.operators.integer_elements import product_factor, quotient_factor, quotients
from graphopt.operators.requantization import Requantization

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


@dataclass(frozen=True, eq=False)
class _Pair:
    """The constants of two operands and the result."""

    a_scale: Tensor
    b_scale: Tensor
    zeros: tuple[int, int]
    into: Requantization

    @staticmethod
    def of(lowering: Lowering, node: Node) -> _Pair:
        names = ("a_scale", "a_zero_point", "b_scale", "b_zero_point", "scale", "zero_point")
        held, given = constants(lowering, node, names), arguments(node)
        into = Requantization(
            held["scale"], held["zero_point"], None, given["qmin"], given["qmax"], given["dtype"], False
        )
        zeros = zero_of(held["a_zero_point"]), zero_of(held["b_zero_point"])
        return _Pair(held["a_scale"], held["b_scale"], zeros, into)


def _add(lowering: Lowering, node: Node) -> Lazy:
    pair, given = _Pair.of(lowering, node), arguments(node)
    assert pair.into.scale is not None
    left, right = (float(factor) for factor in quotients(pair.a_scale, pair.b_scale, pair.into.scale))

    def expression(a: Any, b: Any) -> Any:
        a, b = (number_of(x, zero) for x, zero in zip((a, b), pair.zeros, strict=True))
        return codes_of(a * like(a, left) + b * like(b, right), pair.into, 255 * (abs(left) + abs(right)))

    types = [DTYPES[given[name].meta["val"].dtype] for name in ("a", "b")]
    return element_wise(lowering, node, [given["a"], given["b"]], expression, types)


def _multiply(lowering: Lowering, node: Node) -> Lazy:
    pair, given = _Pair.of(lowering, node), arguments(node)
    factor = float(product_factor(pair.a_scale, pair.b_scale, pair.into.scale))

    def expression(a: Any, b: Any) -> Any:
        a, b = (x - like(x, zero) for x, zero in zip((a, b), pair.zeros, strict=True))
        number = (a * b).astype("float32")
        return codes_of(number * like(number, factor), pair.into, 255 * 255 * factor)

    return element_wise(lowering, node, [given["a"], given["b"]], expression, "int32")


def _divide(lowering: Lowering, node: Node) -> Lazy:
    pair, given = _Pair.of(lowering, node), arguments(node)
    assert pair.into.scale is not None
    factor = float(quotient_factor(pair.a_scale, pair.b_scale, pair.into.scale))

    def expression(a: Any, b: Any) -> Any:
        a, b = (number_of(x, zero) for x, zero in zip((a, b), pair.zeros, strict=True))
        return codes_of(a * like(a, factor) / b, pair.into)

    types = [DTYPES[given[name].meta["val"].dtype] for name in ("a", "b")]
    return element_wise(lowering, node, [given["a"], given["b"]], expression, types)


def _table(lowering: Lowering, node: Node) -> Lazy:
    """Entries lie in the order of codes as unsigned bytes: LLVM's functions look up vectors of those."""
    value = lowering.tensor(arguments(node)["x"])
    held = constants(lowering, node, ("table",))["table"]
    signed = value.dtype == "int8"
    elements = lowering.weight(held, "unsigned", lambda array: np.roll(array, 128)) if signed else lowering.weight(held)

    def element(kernel: Kernel, index: Index) -> Any:
        code = kernel.load(value, index).astype("uint8")
        return kernel.flat(elements.storage)[code.astype("int32")]

    return Lazy(value.shape, elements.dtype, (value, elements), element, name="table")


def _matmul(lowering: Lowering, node: Node) -> Any:
    pair, given = _Pair.of(lowering, node), arguments(node)
    shape, depth = shape_of(node.meta["val"]), shape_of(given["a"].meta["val"])[-1]
    operands = [lowering.tensor(given[name]) for name in ("a", "b")]
    factor = float(product_factor(pair.a_scale, pair.b_scale, pair.into.scale))
    dtype = DTYPES[pair.into.dtype]
    largest = math.inf if not isinstance(depth, int) else min(depth * FURTHEST**2, 2.0**31) * factor

    def begin(result: Any) -> Lazy:
        def element(kernel: Kernel, index: Index) -> Any:
            number = kernel.load(result, index).astype("float32")
            number = number * like(number, factor)
            return number if pair.into.scale is None else convert(codes_of(number, pair.into, largest), dtype)

        name = "dequantize" if pair.into.scale is None else "requantize"
        return Lazy(result.shape, dtype, (result,), element, name=name)

    if len(operands[0].shape) > 1 < len(operands[1].shape) and isinstance(depth, int):
        codes = _as_multiplied(lowering, operands, pair.zeros)

        def build(result: Product, end: Any) -> Code:
            name = f"qmatmul_{node.name}"
            return lowering.choose(integer_batched_gemm.offer(codes, result, end, name, lowering.target))

        return lowering.anchored(node, build, begin, sums="int32")
    a, b = (lowering.view(_centered(x, zero, "int32")) for x, zero in zip(operands, pair.zeros, strict=True))

    def product(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        (k,) = reduced
        axes = [index.axis(number) for number in range(len(shape))]
        column = axes.pop() if len(b.shape) > 1 else None
        row = axes.pop() if len(a.shape) > 1 else None
        left = [*_leading(a, axes), *([] if row is None else [row]), k]
        right = [*_leading(b, axes), k, *([] if column is None else [column])]
        factors = [kernel.load(x, Index(x.shape, kernel.sizes, axes=tuple(at))) for x, at in ((a, left), (b, right))]
        return factors[0] * factors[1]

    sums = reduce_generic(lowering, "qmatmul", shape, "int32", (a.shape[-1],), (a, b), product, "sum")
    return begin(sums)


def _as_multiplied(lowering: Lowering, operands: list[Value], zeros: tuple[int, int]) -> Operands:
    """The left codes as the target's words have activations, in rows; the right ones as they are, in any order."""
    a, zero = stored_codes(operands[0], zeros[0], words_of(lowering.target))
    rows = lowering.view(a)
    return Operands(
        rows if rows.strides[-1] == 1 else lowering.contiguous(rows), lowering.view(operands[1]), zero, zeros[1]
    )


def _leading(value: Value, axes: list[Any]) -> list[Any]:
    """The indices of the leading axes, which broadcast."""
    lead = value.shape[:-2]
    used = axes[len(axes) - len(lead) :] if lead else []
    return [0 if size == 1 else axis for size, axis in zip(lead, used, strict=True)]


def _centered(value: Value, zero: int, dtype: str) -> Lazy:
    def element(kernel: Kernel, index: Index) -> Any:
        code = kernel.load(value, index).astype("int32")
        return convert(code - like(code, zero), dtype)

    return Lazy(value.shape, dtype, (value,), element, flat=True, name="center")


_graphopt = torch.ops.graphopt
TABLE: dict[Any, Callable[..., Any]] = {
    _graphopt.qadd.default: _add,
    _graphopt.qmul.default: _multiply,
    _graphopt.qdiv.default: _divide,
    _graphopt.table256.default: _table,
}
PRODUCTS: dict[Any, Callable[..., Any]] = {_graphopt.qmatmul.default: _matmul}
