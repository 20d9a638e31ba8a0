"""graphopt::qadd, qmul, qdiv and qmatmul of two tensors of codes, and graphopt::table256, any function of one code.

The functions here are the specification. Codes are uint8 or int8 with one scale and zero point (shape (), float32 and
the type of the codes; no zero point is 0) for each operand and the result, which is clamp(round(v) + zero_point, qmin,
qmax) of `dtype`, halves to even. v is made of the float32 constants p = a_scale / scale, q = b_scale / scale, r =
a_scale * b_scale / scale and s = a_scale / (b_scale * scale), divided in float64, and of differences from the zero
points:

- qadd: v = a p + b q, where the product that is added is not rounded; a negative b_scale subtracts;
- qmul: v = a b r, with an exact product of integers;
- qdiv: v = (a s) / b; by 0 it is an infinity, which is clamped, and 0 / 0 becomes qmin;
- qmatmul: v = (sum of a b) r, with exact sums in int32.

Without a `scale` qmatmul gives the numbers, (sum of a b) a_scale b_scale. No gradient passes through.

Source: ONNX QLinearMatMul; QLinearAdd and QLinearMul of com.microsoft.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators.quantization import computed_in
from graphopt.operators.requantization import Requantization, codes_of, multiply_add

_OPERANDS = (
    "Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, "
    "Tensor{optional} scale, Tensor? zero_point, *, int qmin=0, int qmax=255, ScalarType dtype"
)


@torch.library.custom_op("graphopt::qadd", mutates_args=(), schema=f"({_OPERANDS.format(optional='')}) -> Tensor")
def qadd(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of a + b, which broadcast."""
    into = _into(a, b, scale, zero_point, qmin, qmax, dtype)
    left, right = quotients(a_scale, b_scale, scale)
    first = _centered(a, a_zero_point).to(left.dtype) * left
    return codes_of(multiply_add(_centered(b, b_zero_point).to(left.dtype), right, first), into)


@torch.library.custom_op("graphopt::qmul", mutates_args=(), schema=f"({_OPERANDS.format(optional='')}) -> Tensor")
def qmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of a * b, which broadcast."""
    into = _into(a, b, scale, zero_point, qmin, qmax, dtype)
    factor = product_factor(a_scale, b_scale, scale)
    product = _centered(a, a_zero_point) * _centered(b, b_zero_point)
    return codes_of(product.to(factor.dtype) * factor, into)


@torch.library.custom_op("graphopt::qdiv", mutates_args=(), schema=f"({_OPERANDS.format(optional='')}) -> Tensor")
def qdiv(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of a / b, which broadcast."""
    into = _into(a, b, scale, zero_point, qmin, qmax, dtype)
    factor = quotient_factor(a_scale, b_scale, scale)
    above, below = (_centered(x, zero).to(factor.dtype) for x, zero in ((a, a_zero_point), (b, b_zero_point)))
    return codes_of(above * factor / below, into)


@torch.library.custom_op("graphopt::qmatmul", mutates_args=(), schema=f"({_OPERANDS.format(optional='?')}) -> Tensor")
def qmatmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """Codes, or numbers of `dtype`, of a [..., M, K] times b [..., K, N], whose leading axes broadcast."""
    into = _into(a, b, scale, zero_point, qmin, qmax, dtype)
    factor = product_factor(a_scale, b_scale, scale)
    sums = torch.matmul(_centered(a, a_zero_point).double(), _centered(b, b_zero_point).double())
    number = sums.to(torch.int64).to(torch.int32).to(factor.dtype) * factor
    return number.to(dtype) if scale is None else codes_of(number, into)


@torch.library.custom_op("graphopt::table256", mutates_args=(), schema="(Tensor x, Tensor table) -> Tensor")
def table256(x: Tensor, table: Tensor) -> Tensor:
    """table[code - lowest code] for each code of x, uint8 or int8; `table` [256] of any type."""
    _check_table(x, table)
    return table[x.to(torch.int64) + (128 if x.dtype == torch.int8 else 0)]


def quotients(a_scale: Tensor, b_scale: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of `qadd`."""
    compute = computed_in(a_scale.dtype)
    return (a_scale.double() / scale.double()).to(compute), (b_scale.double() / scale.double()).to(compute)


def quotient_factor(a_scale: Tensor, b_scale: Tensor, scale: Tensor) -> Tensor:
    """s of `qdiv`."""
    return (a_scale.double() / (b_scale.double() * scale.double())).to(computed_in(a_scale.dtype))


def product_factor(a_scale: Tensor, b_scale: Tensor, scale: Tensor | None) -> Tensor:
    """r, or the scale of a product where it becomes a number."""
    product = a_scale.double() * b_scale.double()
    return (product if scale is None else product / scale.double()).to(computed_in(a_scale.dtype))


def _centered(x: Tensor, zero_point: Tensor | None) -> Tensor:
    return x.to(torch.int32) - (0 if zero_point is None else int(zero_point))


def _into(
    a: Tensor, b: Tensor, scale: Tensor | None, zero_point: Tensor | None, qmin: int, qmax: int, dtype: torch.dtype
) -> Requantization:
    for codes in (a, b):
        if codes.dtype not in (torch.uint8, torch.int8):
            raise UsageError(f"sums and products of codes take 8 bits, not {codes.dtype}")
    into = Requantization(scale, zero_point, None, qmin, qmax, dtype, False)
    into.check()
    return into


def _check_table(x: Tensor, table: Tensor) -> None:
    if x.dtype not in (torch.uint8, torch.int8) or tuple(table.shape) != (256,):
        raise UsageError(f"a table of {list(table.shape)} for {x.dtype} does not have one element for each 8-bit code")


def _fake(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor | None, b: Tensor, b_scale: Tensor, b_zero_point: Tensor | None,
    scale: Tensor | None, zero_point: Tensor | None, *, qmin: int = 0, qmax: int = 255, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _into(a, b, scale, zero_point, qmin, qmax, dtype)
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape), dtype=dtype)


def _fake_matmul(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor | None, b: Tensor, b_scale: Tensor, b_zero_point: Tensor | None,
    scale: Tensor | None, zero_point: Tensor | None, *, qmin: int = 0, qmax: int = 255, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _into(a, b, scale, zero_point, qmin, qmax, dtype)
    return a.new_empty(torch.matmul(a.float(), b.float()).shape, dtype=dtype)


def _fake_table(x: Tensor, table: Tensor) -> Tensor:
    _check_table(x, table)
    return x.new_empty(x.shape, dtype=table.dtype)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _refuse_gradient_of_table(ctx, inputs, output)


def _refuse_gradient_of_table(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through functions of codes; train before qdq-fusion, or run under torch.no_grad()"
        )


qadd.register_fake(_fake)
qmul.register_fake(_fake)
qdiv.register_fake(_fake)
qmatmul.register_fake(_fake_matmul)
table256.register_fake(_fake_table)
for _operator in (qadd, qmul, qdiv, qmatmul):
    _operator.register_autograd(lambda ctx, grad: (None,) * 8, setup_context=_refuse_gradient)
table256.register_autograd(lambda ctx, grad: (None, None), setup_context=_refuse_gradient_of_table)
