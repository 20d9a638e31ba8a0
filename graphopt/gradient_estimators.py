"""Gradients for steps, roundings and random gates: what a pass trains with where the deployed graph has no gradient.

The forward value of every estimator is the deployed value, so a module that uses one is captured as plain ATen (`gt`,
`_to_copy`, `round`, ...) without an operator of its own. Those that draw noise take `training` as dropout does: with
`training=False` they give the gate that is deployed, without noise. Noise comes from `generator`, or else from
PyTorch's global one, which `graphopt.fit` seeds anew for every step.

In the formulas g is the gradient of the loss for the result, s the logistic function, 1[c] is 1 where c holds, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphopt.errors import UsageError

Function = Callable[[Tensor], Tensor]

STRETCH = (-0.1, 1.1)  # the interval that a hard concrete gate is stretched to before it is clipped to [0, 1]
TEMPERATURE = 2 / 3  # of hard concrete gates, as in their paper


def straight_through_step(x: Tensor) -> Tensor:
    """1[x > 0] in the dtype of x; gradient g, as if the step were the identity.

    Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """
    return _estimate(x, _step, torch.ones_like)


def clipped_step(x: Tensor, width: float = 1.0) -> Tensor:
    """1[x > 0]; gradient g * 1[|x| <= width], that of clamp(x, -width, width).

    Hubara et al. 2016, arXiv 1602.02830.
    """
    _check_positive("width", width)
    return _estimate(x, _step, lambda v: (v.abs() <= width).to(v.dtype))


def sigmoid_slope_step(x: Tensor, slope: float = 1.0) -> Tensor:
    """1[x > 0]; gradient g * slope * s(slope * x) * (1 - s(slope * x)), that of s(slope * x).

    The variant of arXiv 1308.3432; `slope` as in slope annealing, Chung et al. 2017, arXiv 1609.01704.
    """
    _check_positive("slope", slope)
    return _estimate(x, _step, lambda v: slope * _logistic_slope(slope * v))


def hard_sigmoid_step(x: Tensor, width: float = 3.0) -> Tensor:
    """1[x > 0]; gradient g / (2 * width) * 1[|x| <= width], that of clamp(x / (2 * width) + 1/2, 0, 1).

    The hard sigmoid of Courbariaux et al. 2015, arXiv 1511.00363 (width 1); 3 is PyTorch's `hardsigmoid`.
    """
    _check_positive("width", width)
    return _estimate(x, _step, lambda v: (v.abs() <= width).to(v.dtype) / (2 * width))


def straight_through_round(x: Tensor) -> Tensor:
    """The nearest whole number, halves to even; gradient g, as if rounding were the identity. arXiv 1308.3432."""
    return _estimate(x, torch.round, torch.ones_like)


def clipped_round(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(round(x), low, high); gradient g * 1[low <= x <= high], that of clamp(x, low, high).

    Jacob et al. 2018, arXiv 1712.05877.
    """
    _check_range(low, high)
    return _estimate(x, lambda v: v.round().clamp(low, high), lambda v: ((v >= low) & (v <= high)).to(v.dtype))


def learned_scale_round(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """scale * clamp(round(x / scale), low, high) with a learned scale (LSQ), which broadcasts against x.

    With v = x / scale: the gradient for x is g * 1[low < v < high]; for the scale it is the sum, over the n elements
    that share a scale, of g * (round(v) - v where low < v < high, low where v <= low, high where v >= high), divided by
    sqrt(n * high), or by sqrt(n) where high is below 1. Esser et al. 2020, arXiv 1902.08153, equations 3 and 5.
    """
    _check_range(low, high)
    result: Tensor = _LearnedScale.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    return result


def bernoulli_step(x: Tensor, *, training: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability s(x), else 0; gradient g * s(x) * (1 - s(x)), that of the mean. Deployed: 1[x > 0].

    The stochastic neuron of arXiv 1308.3432.
    """
    if not training:
        return _step(x)
    uniform = _uniform(x, generator)
    return _estimate(x, lambda v: (uniform < v.sigmoid()).to(v.dtype), _logistic_slope)


def binary_concrete(
    logits: Tensor,
    temperature: float,
    *,
    hard: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = s((logits + log u - log(1 - u)) / temperature), u uniform in (0, 1); gradient g * y * (1 - y) / temperature.

    `hard` gives 1[y > 1/2] with the same gradient. Deployed: 1[logits > 0].
    Maddison, Mnih, Teh 2017, arXiv 1611.00712; Jang, Gu, Poole 2017, arXiv 1611.01144.
    """
    _check_positive("temperature", temperature)
    if not training:
        return _step(logits)
    noisy = (logits + _logistic_noise(logits, generator)) / temperature
    return sigmoid_slope_step(noisy) if hard else noisy.sigmoid()


def gumbel_softmax(
    logits: Tensor,
    temperature: float,
    *,
    axis: int = -1,
    hard: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = softmax((logits - log(-log u)) / temperature) along `axis`; gradient y * (g - sum(g * y)) / temperature.

    `hard` gives the one-hot vector of the largest y with the same gradient. Deployed: one-hot of the largest logit.
    Jang, Gu, Poole 2017, arXiv 1611.01144.
    """
    _check_positive("temperature", temperature)
    if not training:
        return _one_hot(logits, axis)
    gumbel = -torch.log(-torch.log(_uniform(logits, generator)))
    soft = ((logits + gumbel) / temperature).softmax(axis)
    return _estimate(soft, lambda v: _one_hot(v, axis), torch.ones_like) if hard else soft


def hard_concrete(
    log_alpha: Tensor,
    temperature: float = TEMPERATURE,
    *,
    stretch: tuple[float, float] = STRETCH,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A gate in [0, 1] that is exactly 0 or 1 with positive probability: y of `binary_concrete`, stretched and clipped.

    z = clamp(low + (high - low) * y, 0, 1), gradient g * (high - low) * y * (1 - y) / temperature * 1[0 <= z' <= 1], z'
    being z before clipping. Deployed: clamp(low + (high - low) * s(log_alpha), 0, 1).
    Louizos, Welling, Kingma 2018, arXiv 1712.01312, equations 10 to 13.
    """
    low, high = _checked_stretch(stretch)
    soft = binary_concrete(log_alpha, temperature, generator=generator) if training else log_alpha.sigmoid()
    return (low + (high - low) * soft).clamp(0, 1)


def hard_concrete_penalty(
    log_alpha: Tensor, temperature: float = TEMPERATURE, *, stretch: tuple[float, float] = STRETCH
) -> Tensor:
    """The probability that each `hard_concrete` gate is not 0, s(log_alpha - temperature * log(-low / high)).

    Its sum is the expected number of open gates, the L0 penalty; gradient g * p * (1 - p).
    Louizos, Welling, Kingma 2018, arXiv 1712.01312, equation 12.
    """
    _check_positive("temperature", temperature)
    low, high = _checked_stretch(stretch)
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


def _estimate(x: Tensor, value: Function, slope: Function) -> Tensor:
    result: Tensor = _Estimate.apply(x, value, slope)  # type: ignore[no-untyped-call]
    return result


class _Estimate(torch.autograd.Function):
    """The value of one function with the slope of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Function, slope: Function) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return gradient * ctx.slope(x), None, None


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.range = low, high
        return (x / scale).round().clamp(low, high) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.range
        steps = x / scale
        inside = (steps > low) & (steps < high)
        per_element = torch.where(inside, steps.round() - steps, steps.clamp(low, high))
        shared = x.numel() / max(scale.numel(), 1)
        for_scale = (gradient * per_element).sum_to_size(scale.shape) / math.sqrt(max(shared, 1) * max(high, 1))
        return gradient * inside, for_scale, None, None


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _one_hot(x: Tensor, axis: int) -> Tensor:
    classes = torch.arange(x.shape[axis], device=x.device)
    return (x.argmax(axis, keepdim=True).movedim(axis, -1) == classes).to(x.dtype).movedim(-1, axis)


def _logistic_slope(x: Tensor) -> Tensor:
    soft = x.sigmoid()
    return soft * (1 - soft)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in the open interval: neither logarithm of what is drawn, nor of its complement, is infinite."""
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    tiny = torch.finfo(like.dtype).eps
    return drawn.clamp(tiny, 1 - tiny)


def _logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = _uniform(like, generator)
    return uniform.log() - (-uniform).log1p()


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"{name}={value} must be positive")


def _check_range(low: float, high: float) -> None:
    if not low < high:
        raise UsageError(f"low={low} must be below high={high}")


def _checked_stretch(stretch: tuple[float, float]) -> tuple[float, float]:
    low, high = stretch
    if not (low < 0 and high > 1):
        raise UsageError(
            f"stretch={stretch} must begin below 0 and end above 1, otherwise no gate ever closes or opens"
        )
    return low, high
