"""One step of an optimizer, of the domain ai.onnx.preview.training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten
_DOMAIN = "ai.onnx.preview.training"


def _each(
    op: Operation, rate: Present, step: Present, given: tuple[Present, ...], kinds: int, update: Callable[..., Any]
) -> tuple[Tensor, ...]:
    """`given` has all weights, then all gradients, then all of each state; so have the results, without gradients."""
    if not given or len(given) % kinds:
        raise op.refuse(f"{op.name} takes {kinds} inputs for each weight behind its rate and step")
    count = len(given) // kinds
    updated = [update(*map(op.tensor, given[place::count])) for place in range(count)]
    return tuple(value for values in zip(*updated, strict=True) for value in values)


def _scaled(op: Operation, value: Any, factor: Any) -> Tensor:
    return op.call(aten.mul.Tensor, value, factor)


def _sum(op: Operation, left: Any, right: Any) -> Tensor:
    return op.call(aten.add.Tensor, left, right)


def _regularized(op: Operation, weight: Tensor, gradient: Tensor) -> Tensor:
    decay = op.attributes.number("norm_coefficient", 0.0)
    return _sum(op, gradient, _scaled(op, weight, decay)) if decay else gradient


def _is_later(op: Operation, step: Present) -> Tensor:
    return op.call(aten.gt.Scalar, op.tensor(step), 0)


@operator(f"{_DOMAIN}.Adagrad")
def adagrad(op: Operation, rate: Present, step: Present, *given: Present) -> tuple[Tensor, ...]:
    decay, epsilon = op.attributes.number("decay_factor", 0.0), op.attributes.number("epsilon", 1e-6)
    steps = _sum(op, _scaled(op, op.cast(step, torch.float32), decay), 1.0)
    now = op.call(aten.div.Tensor, op.tensor(rate), steps)

    def update(weight: Tensor, gradient: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        gradient = _regularized(op, weight, gradient)
        squares = _sum(op, squares, _scaled(op, gradient, gradient))
        length = _sum(op, op.call(aten.sqrt.default, squares), epsilon)
        change = op.call(aten.div.Tensor, _scaled(op, now, gradient), length)
        return op.call(aten.sub.Tensor, weight, change), squares

    return _each(op, rate, step, given, 3, update)


@operator(f"{_DOMAIN}.Momentum")
def momentum(op: Operation, rate: Present, step: Present, *given: Present) -> tuple[Tensor, ...]:
    """The first step takes the gradient as it is, whatever beta says."""
    alpha, beta = op.attributes.number("alpha", 0.0), op.attributes.number("beta", 0.0)
    mode = op.attributes.text("mode", "standard")
    if mode not in ("standard", "nesterov"):
        raise op.refuse(f"mode {mode!r} of Momentum is neither standard nor nesterov")
    share = op.call(aten.where.Scalar, _is_later(op, step), beta, 1.0)
    share = op.cast(share, given[0].dtype) if given else share

    def update(weight: Tensor, gradient: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        gradient = _regularized(op, weight, gradient)
        speed = _sum(op, _scaled(op, speed, alpha), _scaled(op, gradient, share))
        change = speed if mode == "standard" else _sum(op, gradient, _scaled(op, speed, alpha))
        return op.call(aten.sub.Tensor, weight, _scaled(op, change, op.tensor(rate))), speed

    return _each(op, rate, step, given, 3, update)


@operator(f"{_DOMAIN}.Adam")
def adam(op: Operation, rate: Present, step: Present, *given: Present) -> tuple[Tensor, ...]:
    alpha, beta = op.attributes.number("alpha", 0.9), op.attributes.number("beta", 0.999)
    epsilon, after = op.attributes.number("epsilon", 1e-6), op.attributes.number("norm_coefficient_post", 0.0)
    time = op.cast(step, torch.float32)

    def left(number: float) -> Tensor:
        """1 - number^step."""
        power = op.call(aten.pow.Scalar, number, time)
        return op.call(aten.rsub.Scalar, power, 1.0)

    bias = op.call(aten.div.Tensor, op.call(aten.sqrt.default, left(beta)), left(alpha))
    ones = op.call(aten.ones_like.default, bias)
    now = _scaled(op, op.tensor(rate), op.call(aten.where.self, _is_later(op, step), bias, ones))

    def update(weight: Tensor, gradient: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = _regularized(op, weight, gradient)
        mean = _sum(op, _scaled(op, mean, alpha), _scaled(op, gradient, 1 - alpha))
        squares = _sum(op, _scaled(op, squares, beta), _scaled(op, _scaled(op, gradient, gradient), 1 - beta))
        length = _sum(op, op.call(aten.sqrt.default, squares), epsilon)
        weight = op.call(aten.sub.Tensor, weight, op.call(aten.div.Tensor, _scaled(op, now, mean), length))
        return _scaled(op, weight, 1 - after), mean, squares

    return _each(op, rate, step, given, 4, update)
