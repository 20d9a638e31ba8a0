"""Operators of the domain com.microsoft over images, whose channels may be the last axis.

Source: ONNX Runtime's contributed operators (docs/ContribOperators.md).
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.convolution import conv
from graphopt.capture.onnx.operators.microsoft import fused_convolution, sum_of
from graphopt.capture.onnx.operators.pooling import max_pool
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten


def channels_first(op: Operation, value: Present) -> Tensor:
    """[N, C, ...] of [N, ..., C]."""
    return op.call(aten.permute.default, value, [0, value.ndim - 1, *range(1, value.ndim - 1)])


def channels_last(op: Operation, value: Present) -> Tensor:
    """[N, ..., C] of [N, C, ...]."""
    return op.call(aten.permute.default, value, [0, *range(2, value.ndim), 1])


@operator("com.microsoft.NhwcConv")
def convolution(op: Operation, value: Present, weight: Present, bias: Present | None = None) -> Tensor:
    return channels_last(op, conv(op, channels_first(op, value), weight, bias))


@operator("com.microsoft.NhwcFusedConv")
def activated_convolution(
    op: Operation, value: Present, weight: Present, bias: Present | None = None, added: Present | None = None
) -> Tensor:
    other = None if added is None else channels_first(op, added)
    return channels_last(op, fused_convolution(op, channels_first(op, value), weight, bias, other))


@operator("com.microsoft.NhwcMaxPool")
def pool(op: Operation, value: Present) -> Tensor:
    return channels_last(op, max_pool(op, channels_first(op, value)))


@operator("com.microsoft.GroupNorm")
def group_norm(op: Operation, value: Present, weight: Present, bias: Present) -> Tensor:
    return _normalized(op, op.tensor(value), weight, bias)


@operator("com.microsoft.SkipGroupNorm")
def skip_group_norm(
    op: Operation, value: Present, weight: Present, bias: Present, skip: Present, value_bias: Present | None = None
) -> Any:
    """The group norm of value + skip + value_bias, and this sum; skip may be one number for each image and channel."""
    if skip.ndim == 2:
        last = bool(op.attributes.integer("channels_last", 1))
        for axis in (1, 2) if last else (2, 3):
            skip = op.call(aten.unsqueeze.default, skip, axis)
    total = sum_of(op, value, skip, value_bias)
    result = _normalized(op, total, weight, bias)
    return (result, total) if op.outputs > 1 else result


def _normalized(op: Operation, value: Tensor, weight: Present, bias: Present) -> Tensor:
    last, activation = bool(op.attributes.integer("channels_last", 1)), op.attributes.integer("activation")
    groups, epsilon = op.attributes.integer("groups"), op.attributes.number("epsilon", 1e-5)
    if activation not in (0, 1):
        raise op.refuse(f"activation {activation} does not exist; the file is damaged")
    value = channels_first(op, value) if last else value
    result = op.call(aten.group_norm.default, value, groups, weight, bias, epsilon, True)
    result = op.call(aten.silu.default, result) if activation else result
    return channels_last(op, result) if last else result
