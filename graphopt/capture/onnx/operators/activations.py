"""Activation functions and softmax."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten

_PLAIN = {
    "Relu": aten.relu, "Sigmoid": aten.sigmoid, "Tanh": aten.tanh, "HardSwish": aten.hardswish, "Mish": aten.mish,
    "Softplus": aten.softplus,
}  # fmt: skip


@operator(*_PLAIN)
def plain(op: Operation, value: Present) -> Tensor:
    return op.call(_PLAIN[op.name].default, value)


@operator("Gelu")
def gelu(op: Operation, value: Present) -> Tensor:
    approximate = op.attributes.text("approximate", "none")
    if approximate == "none":
        return op.call(aten.gelu.default, value)
    return op.call(aten.gelu.default, value, approximate=approximate)


@operator("Swish")
def swish(op: Operation, value: Present) -> Tensor:
    alpha = op.attributes.number("alpha", 1.0)
    if alpha == 1:
        return op.call(aten.silu.default, value)
    scaled = op.call(aten.mul.Tensor, op.tensor(value), alpha)
    return op.call(aten.mul.Tensor, op.tensor(value), op.call(aten.sigmoid.default, scaled))


@operator("LeakyRelu")
def leaky_relu(op: Operation, value: Present) -> Tensor:
    return op.call(aten.leaky_relu.default, value, op.attributes.number("alpha", 0.01))


@operator("Elu")
def elu(op: Operation, value: Present) -> Tensor:
    return op.call(aten.elu.default, value, op.attributes.number("alpha", 1.0))


@operator("Selu")
def selu(op: Operation, value: Present) -> Tensor:
    alpha, gamma = op.attributes.number("alpha", 1.6732632), op.attributes.number("gamma", 1.050701)
    return op.call(aten.elu.default, value, alpha, gamma)


@operator("Celu")
def celu(op: Operation, value: Present) -> Tensor:
    alpha = op.attributes.number("alpha", 1.0)
    return op.call(aten.elu.default, value, alpha, 1.0, 1.0 / alpha)


@operator("HardSigmoid")
def hard_sigmoid(op: Operation, value: Present) -> Tensor:
    alpha, beta = op.attributes.number("alpha", 0.2), op.attributes.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return op.call(aten.hardsigmoid.default, value)
    line = op.call(aten.add.Tensor, op.call(aten.mul.Tensor, op.tensor(value), alpha), beta)
    return op.call(aten.clamp.default, line, 0.0, 1.0)


@operator("ThresholdedRelu")
def thresholded_relu(op: Operation, value: Present) -> Tensor:
    return op.call(aten.threshold.default, value, op.attributes.number("alpha", 1.0), 0.0)


@operator("PRelu")
def prelu(op: Operation, value: Present, slope: Present) -> Tensor:
    negative = op.call(aten.mul.Tensor, op.tensor(value), slope)
    return op.call(aten.where.self, op.call(aten.lt.Scalar, value, 0), negative, value)


@operator("Softsign")
def softsign(op: Operation, value: Present) -> Tensor:
    one_more = op.call(aten.add.Tensor, op.call(aten.abs.default, value), 1.0)
    return op.call(aten.div.Tensor, op.tensor(value), one_more)


@operator("Softmax", "LogSoftmax")
def softmax(op: Operation, value: Present) -> Tensor:
    """Before opset 13 the axes from `axis` on are one."""
    target = aten.softmax.int if op.name == "Softmax" else aten.log_softmax.int
    value = op.tensor(value)
    axis = op.axis(op.attributes.integer("axis", -1 if op.opset >= 13 else 1), value.ndim)
    if op.opset >= 13 or axis == value.ndim - 1:
        return op.call(target, value, axis - value.ndim)
    flat = op.reshape(value, [*value.shape[:axis], -1])
    return op.reshape(op.call(target, flat, -1), list(value.shape))
