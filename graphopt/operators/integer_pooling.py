"""graphopt::qavg_pool, the mean of every window of 8-bit codes, as codes again.

The function here is the specification. Codes are uint8 or int8 with one scale and zero point (shape (), float32 and the
type of the codes; no zero point is 0). The sum of x - zero_point over a window is exact in int32; what is padded stands
for 0. Where all windows divide by one number, `divisor`, it is multiplied by r = x_scale / (scale * divisor), divided
in float64 and rounded to float32. Without one a window divides by the elements of x that it covers: the sum times
x_scale / scale, rounded as r is, over their number. A result is clamp(round(that) + zero_point, qmin, qmax) of `dtype`,
halves to even.

Source: QLinearAveragePool of com.microsoft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import UsageError
from graphopt.operators.integer_sums import result_of, sum_factor
from graphopt.operators.requantization import codes_of


@torch.library.custom_op(
    "graphopt::qavg_pool",
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor scale, Tensor? zero_point, *, int[] kernel_size, "
    "int[] stride, int[] padding, bool ceil_mode=False, int? divisor=None, int qmin=0, int qmax=255, "
    "ScalarType dtype) -> Tensor",
)
def qavg_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    divisor: int | None = None,
    qmin: int = 0,
    qmax: int = 255,
    dtype: torch.dtype,
) -> Tensor:
    """x [N, C, ...] with one to three spatial axes, for each of which kernel_size, stride and padding give a number."""
    _check(x, kernel_size, stride, padding)
    into = result_of(x, scale, zero_point, 1 if divisor is None else divisor, qmin, qmax, dtype)
    centered = x.double() - (0 if x_zero_point is None else int(x_zero_point))
    total = _summed(centered, kernel_size, stride, padding, ceil_mode)
    factor = sum_factor(x_scale, scale, 1 if divisor is None else divisor)
    number = total.to(factor.dtype) * factor
    if divisor is None:
        count = _summed(torch.ones_like(centered[:1, :1]), kernel_size, stride, padding, ceil_mode)
        number = number / count.to(factor.dtype)
    return codes_of(number, into)


def _summed(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> Tensor:
    """Sums over windows, whole numbers in float64: of 1s they are what a window covers."""
    if len(kernel_size) == 1:
        return _summed(x.unsqueeze(2), [1, *kernel_size], [1, *stride], [0, *padding], ceil_mode).squeeze(2)
    pool = F.avg_pool2d if len(kernel_size) == 2 else F.avg_pool3d
    return pool(x, list(kernel_size), list(stride), list(padding), ceil_mode, divisor_override=1)


def _check(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    spatial = x.ndim - 2
    if not 1 <= spatial <= 3 or not len(kernel_size) == len(stride) == len(padding) == spatial:
        raise UsageError(
            f"windows of {list(kernel_size)} codes do not fit {list(x.shape)}: give [N, C, ...] and a number for each "
            "axis behind them"
        )


@qavg_pool.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, scale: Tensor, zero_point: Tensor | None, *,
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool = False,
    divisor: int | None = None, qmin: int = 0, qmax: int = 255, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, kernel_size, stride, padding)
    result_of(x, scale, zero_point, 1 if divisor is None else divisor, qmin, qmax, dtype)
    return _summed(x.double(), kernel_size, stride, padding, ceil_mode).to(dtype)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through means of codes; train before qdq-fusion, or run under torch.no_grad()"
        )


qavg_pool.register_autograd(lambda ctx, grad: (None,) * 5, setup_context=_refuse_gradient)
