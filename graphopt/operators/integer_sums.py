"""graphopt::qsum, the sum or mean of 8-bit codes over some axes, as codes again.

The function here is the specification. Codes are uint8 or int8 with one scale and zero point (shape (), float32 and the
type of the codes; no zero point is 0). With the sum of x - zero_point exact in int32 and r = x_scale / (scale *
divisor), divided in float64 and rounded to float32, a result is clamp(round(sum r) + zero_point, qmin, qmax) of
`dtype`, halves to even. The divisor of a mean is the number of codes in each sum, that of a sum 1.

Source: QLinearReduceMean and QLinearGlobalAveragePool of com.microsoft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators.requantization import Requantization, codes_of

MOST_TERMS = (2**31 - 1) // 255  # codes whose sum int32 holds, whatever they are


@torch.library.custom_op(
    "graphopt::qsum",
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor scale, Tensor? zero_point, *, int[] dim, "
    "bool keepdim=False, int divisor=1, int qmin=0, int qmax=255, ScalarType dtype) -> Tensor",
)
def qsum(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    dim: Sequence[int],
    keepdim: bool = False,
    divisor: int = 1,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of the sum over the axes `dim` divided by `divisor`, which is positive."""
    into = result_of(x, scale, zero_point, divisor, qmin, qmax, dtype)
    factor = sum_factor(x_scale, scale, divisor)
    centered = x.to(torch.int64) - (0 if x_zero_point is None else int(x_zero_point))
    return codes_of(centered.sum(list(dim), keepdim).to(torch.int32).to(factor.dtype) * factor, into)


def sum_factor(x_scale: Tensor, scale: Tensor, divisor: int) -> Tensor:
    """r, shape ()."""
    return (x_scale.double() / (scale.double() * divisor)).to(x_scale.dtype)


def result_of(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, divisor: int, qmin: int, qmax: int, dtype: torch.dtype
) -> Requantization:
    """What sums of codes become. Raises UsageError for operands that are no codes, and for no divisor."""
    if x.dtype not in (torch.uint8, torch.int8):
        raise UsageError(f"sums of codes take 8 bits, not {x.dtype}")
    if divisor < 1:
        raise UsageError(f"divisor={divisor} of a sum of codes must be 1 or more")
    into = Requantization(scale, zero_point, None, qmin, qmax, dtype, False)
    into.check()
    return into


def _fake(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, scale: Tensor, zero_point: Tensor | None, *,
    dim: Sequence[int], keepdim: bool = False, divisor: int = 1, qmin: int = 0, qmax: int = 255, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    result_of(x, scale, zero_point, divisor, qmin, qmax, dtype)
    return torch.sum(x, list(dim), keepdim, dtype=torch.int32).to(dtype)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through sums of codes; train before qdq-fusion, or run under torch.no_grad()"
        )


qsum.register_fake(_fake)
qsum.register_autograd(lambda ctx, grad: (None,) * 5, setup_context=_refuse_gradient)
