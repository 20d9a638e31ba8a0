"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten


@operator("LayerNormalization")
def layer_norm(op: Operation, value: Present, weight: Present, bias: Present | None = None) -> Any:
    value, weight = op.tensor(value), op.tensor(weight)
    shape = _normalized(op, value)
    epsilon = op.attributes.number("epsilon", 1e-5)
    stored = value.dtype
    if op.outputs > 1 and stored in (torch.float16, torch.bfloat16):  # statistics are those of float32
        value = op.cast(value, torch.float32)
    fits = list(weight.shape) == shape and (bias is None or list(bias.shape) == shape) and value.dtype == stored
    scale, shift = (weight, bias) if fits else (None, None)
    statistics: tuple[Tensor, ...] = ()
    if op.outputs == 1:
        result = op.call(aten.layer_norm.default, value, shape, scale, shift, epsilon, False)
    else:
        result, *rest = op.parts(aten.native_layer_norm.default, value, shape, scale, shift, epsilon)
        statistics = tuple(op.cast(item, torch.float32) for item in rest)
    if not fits:
        result = op.call(aten.mul.Tensor, op.cast(result, stored), weight)
        result = result if bias is None else op.call(aten.add.Tensor, result, bias)
    return (result, *statistics)


@operator("RMSNormalization")
def rms_norm(op: Operation, value: Present, weight: Present) -> Tensor:
    value, weight = op.tensor(value), op.tensor(weight)
    shape = _normalized(op, value)
    epsilon = op.attributes.number("epsilon", 1e-5)
    if list(weight.shape) == shape:
        return op.call(aten.rms_norm.default, value, shape, weight, epsilon)
    return op.call(aten.mul.Tensor, op.call(aten.rms_norm.default, value, shape, None, epsilon), weight)


def _normalized(op: Operation, value: Tensor) -> list[Any]:
    if op.attributes.integer("stash_type", 1) != 1:
        raise op.refuse("stash_type other than float is not imported")
    return list(value.shape[op.axis(op.attributes.integer("axis", -1), value.ndim) :])


@operator("BatchNormalization")
def batch_norm(op: Operation, value: Present, weight: Present, bias: Present, mean: Present, variance: Present) -> Any:
    """In training mode with the statistics of the batch, and new running ones behind the result."""
    epsilon, momentum = op.attributes.number("epsilon", 1e-5), op.attributes.number("momentum", 0.9)
    if op.opset < 9 and op.attributes.integer("spatial", 1) != 1:
        raise op.refuse("it has statistics for each element; export the model with spatial=1")
    if op.opset < 14 and op.outputs > 1:
        raise op.refuse("it updates its statistics; export the model in eval mode")
    statistics = [op.tensor(item) for item in (weight, bias, mean, variance)]
    if not op.attributes.integer("training_mode"):
        return op.call(aten.batch_norm.default, value, *statistics, False, 1 - momentum, epsilon, True)
    return _in_training(op, op.tensor(value), statistics[:2], statistics[2:], epsilon, momentum)


def _in_training(
    op: Operation, value: Tensor, scaling: list[Tensor], running: list[Tensor], epsilon: float, momentum: float
) -> tuple[Tensor, ...]:
    along = [0, *range(2, value.ndim)]
    wide = op.cast(value, running[0].dtype)
    mean = op.call(aten.mean.dim, wide, along, True)
    apart = op.call(aten.sub.Tensor, wide, mean)
    variance = op.call(aten.mean.dim, op.call(aten.mul.Tensor, apart, apart), along, True)
    now = [op.reshape(item, [value.shape[1]]) for item in (mean, variance)]
    kept = [
        op.call(aten.add.Tensor, op.call(aten.mul.Tensor, old, momentum), op.call(aten.mul.Tensor, new, 1 - momentum))
        for old, new in zip(running, now, strict=True)
    ]
    result = op.call(aten.batch_norm.default, value, *scaling, *now, False, 1 - momentum, epsilon, True)
    return result, *kept


@operator("InstanceNormalization")
def instance_norm(op: Operation, value: Present, weight: Present, bias: Present) -> Tensor:
    epsilon = op.attributes.number("epsilon", 1e-5)
    return op.call(aten.instance_norm.default, value, weight, bias, None, None, True, 0.1, epsilon, True)


@operator("GroupNormalization")
def group_norm(op: Operation, value: Present, weight: Present, bias: Present) -> Tensor:
    """Before opset 21 there is one weight and bias for each group, not for each channel."""
    groups, epsilon = op.attributes.integer("num_groups"), op.attributes.number("epsilon", 1e-5)
    op.attributes.ignore("stash_type")
    if op.opset < 21:
        each = value.shape[1] // groups
        weight, bias = (
            op.reshape(op.call(aten.expand.default, op.reshape(item, [groups, 1]), [groups, each]), [groups * each])
            for item in (weight, bias)
        )
    return op.call(aten.group_norm.default, value, groups, weight, bias, epsilon, True)


@operator("LpNormalization")
def lp_normalization(op: Operation, value: Present) -> Tensor:
    value = op.tensor(value)
    axis, order = op.axis(op.attributes.integer("axis", -1), value.ndim), op.attributes.integer("p", 2)
    length = op.call(aten.linalg_vector_norm.default, value, order, [axis], True)
    zero = op.call(aten.eq.Scalar, length, 0)
    return op.call(aten.div.Tensor, value, op.call(aten.masked_fill.Scalar, length, zero, 1.0))


@operator("LRN")
def local_response(op: Operation, value: Present) -> Tensor:
    """Each element by a power of the squares of channels near its own."""
    value, size = op.tensor(value), op.attributes.integer("size")
    alpha, beta = op.attributes.number("alpha", 1e-4), op.attributes.number("beta", 0.75)
    squares = op.reshape(op.call(aten.mul.Tensor, value, value), [value.shape[0], 1, value.shape[1], -1])
    padded = op.call(aten.constant_pad_nd.default, squares, [0, 0, (size - 1) // 2, size // 2], 0.0)
    means = op.call(aten.avg_pool2d.default, padded, [size, 1], [1, 1])
    scaled = op.call(aten.mul.Tensor, op.reshape(means, list(value.shape)), alpha)
    around = op.call(aten.add.Tensor, scaled, op.attributes.number("bias", 1.0))
    return op.call(aten.div.Tensor, value, op.call(aten.pow.Tensor_Scalar, around, beta))
