"""graphopt::dequantize_lookup: numbers that codes stand for in a table, times a scale.

The function here is the specification. It says what weights in nf4 (16 numbers) and in 8-bit floats (256) are; `axis`
and `block` place the scale as in graphopt::dequantize.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators.quantization import check_parameters, spread


@torch.library.custom_op(
    "graphopt::dequantize_lookup",
    mutates_args=(),
    schema="(Tensor codes, Tensor table, Tensor scale, *, int? axis=None, int block=0) -> Tensor",
)
def dequantize_lookup(
    codes: Tensor, table: Tensor, scale: Tensor, *, axis: int | None = None, block: int = 0
) -> Tensor:
    """table[codes] * scale in the shape of `codes`, which are uint8 below the length of `table`.

    Table and scale, and so the result, are float32 or float64.

    The gradients for `table` and `scale` are exact. Raises UsageError for parameters that do not fit the codes.
    """
    _check(codes, table, scale, axis, block)
    return (table[codes.to(torch.int64)] * spread(scale, codes, axis, block)).contiguous()


@dequantize_lookup.register_fake
def _(codes: Tensor, table: Tensor, scale: Tensor, *, axis: int | None = None, block: int = 0) -> Tensor:
    _check(codes, table, scale, axis, block)
    return table.new_empty(codes.shape)


def _check(codes: Tensor, table: Tensor, scale: Tensor, axis: int | None, block: int) -> None:
    if codes.dtype != torch.uint8 or table.dtype not in (torch.float32, torch.float64) or table.dim() != 1:
        raise UsageError(
            "graphopt::dequantize_lookup takes uint8 codes and a vector of float32 or float64, not "
            f"{codes.dtype} and {table.dtype}{list(table.shape)}"
        )
    check_parameters(codes, scale, None, axis, block)


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.axis, ctx.block = keyword_only_inputs["axis"], keyword_only_inputs["block"]


def _gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
    codes, table, scale = ctx.saved_tensors
    with torch.enable_grad():
        numbers, steps = table.detach().requires_grad_(), scale.detach().requires_grad_()
        value = numbers[codes.to(torch.int64)] * spread(steps, codes, ctx.axis, ctx.block)
    found = torch.autograd.grad(value, [numbers, steps], grad)
    return None, found[0], found[1]


dequantize_lookup.register_autograd(_gradient, setup_context=_keep)
