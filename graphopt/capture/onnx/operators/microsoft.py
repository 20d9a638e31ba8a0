"""Operators of the domain com.microsoft, which ONNX Runtime's own optimizers put in place of standard ones.

Source: ONNX Runtime's contributed operators (docs/ContribOperators.md). Attention and its kin are in
`microsoft_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.convolution import conv
from graphopt.capture.onnx.operators.linear import gemm, matmul
from graphopt.capture.onnx.operators.normalization import rms_norm
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator("com.microsoft.Gelu", "com.microsoft.BiasGelu")
def gelu(op: Operation, value: Present, bias: Present | None = None) -> Tensor:
    return op.call(aten.gelu.default, sum_of(op, value, bias))


@operator("com.microsoft.FastGelu")
def fast_gelu(op: Operation, value: Present, bias: Present | None = None) -> Tensor:
    return op.call(aten.gelu.default, sum_of(op, value, bias), approximate="tanh")


@operator("com.microsoft.QuickGelu")
def quick_gelu(op: Operation, value: Present) -> Tensor:
    """value * sigmoid(alpha * value)."""
    alpha, value = op.attributes.number("alpha", 1.702), op.tensor(value)
    if alpha == 1:
        return op.call(aten.silu.default, value)
    scaled = op.call(aten.mul.Tensor, value, alpha)
    return op.call(aten.mul.Tensor, value, op.call(aten.sigmoid.default, scaled))


@operator("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def fused_matmul(op: Operation, left: Present, right: Present) -> Tensor:
    """alpha times the product; either side may be given with its last two axes exchanged."""
    if op.attributes.integer("transBatchA") or op.attributes.integer("transBatchB"):
        raise op.refuse("FusedMatMul with transBatchA or transBatchB is not imported")
    left, right = (
        op.call(aten.transpose.int, side, -2, -1) if op.attributes.integer(name) else side
        for side, name in ((left, "transA"), (right, "transB"))
    )
    product, alpha = matmul(op, left, right), op.attributes.number("alpha", 1.0)
    return product if alpha == 1 else op.call(aten.mul.Tensor, product, alpha)


@operator("com.microsoft.GemmFastGelu")
def product_and_fast_gelu(op: Operation, left: Present, right: Present, bias: Present | None = None) -> Tensor:
    return fast_gelu(op, matmul(op, left, right), bias)


@operator("com.microsoft.BiasSplitGelu")
def split_gelu(op: Operation, value: Present, bias: Present) -> Tensor:
    """The left half of the last axis times the GELU of the right one."""
    total = sum_of(op, value, bias)
    left, right = op.parts(aten.split.Tensor, total, total.shape[-1] // 2, -1)
    return op.call(aten.mul.Tensor, left, op.call(aten.gelu.default, right))


@operator("com.microsoft.BiasAdd")
def bias_add(op: Operation, value: Present, bias: Present, skip: Present) -> Tensor:
    return sum_of(op, value, bias, skip)


@operator("com.microsoft.FusedGemm")
def fused_gemm(op: Operation, left: Present, right: Present, bias: Present | None = None) -> Tensor:
    parameters = [op.attributes.number(f"activation_{name}", 0.0) for name in ("alpha", "beta")]
    return _activated(op, gemm(op, left, right, bias), parameters)


@operator("com.microsoft.FusedConv")
def fused_convolution(
    op: Operation, value: Present, weight: Present, bias: Present | None = None, added: Present | None = None
) -> Tensor:
    result = sum_of(op, conv(op, value, weight, bias), added)
    return _activated(op, result, op.attributes.numbers("activation_params") or [])


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda op, value: value,
    "Relu": lambda op, value: op.call(aten.relu.default, value),
    "Sigmoid": lambda op, value: op.call(aten.sigmoid.default, value),
    "Tanh": lambda op, value: op.call(aten.tanh.default, value),
    "LeakyRelu": lambda op, value, alpha: op.call(aten.leaky_relu.default, value, alpha),
    "Clip": lambda op, value, low, high: op.call(aten.clamp.default, value, low, high),
    "HardSigmoid": lambda op, value, alpha, beta: op.call(
        aten.clamp.default, op.call(aten.add.Tensor, op.call(aten.mul.Tensor, value, alpha), beta), 0.0, 1.0
    ),
}
_PARAMETERS = {"LeakyRelu": 1, "Clip": 2, "HardSigmoid": 2}


def _activated(op: Operation, value: Tensor, parameters: list[float]) -> Tensor:
    name = op.attributes.text("activation", "")
    count = _PARAMETERS.get(name, 0)
    if name not in _ACTIVATIONS or len(parameters) < count:
        raise op.refuse(f"activation {name!r} with parameters {parameters} is not imported")
    return _ACTIVATIONS[name](op, value, *parameters[:count])


@operator("com.microsoft.SkipLayerNormalization")
def skip_layer_norm(
    op: Operation, value: Present, skip: Present, weight: Present, bias: Present | None = None,
    value_bias: Present | None = None,
) -> Any:  # fmt: skip
    """The layer norm of value + skip + value_bias, and this sum as the fourth output."""
    total = sum_of(op, value, value_bias, skip)
    epsilon = op.attributes.number("epsilon", 1e-12)
    given = [item if item is None else op.tensor(item) for item in (weight, bias)]
    result = op.call(aten.layer_norm.default, total, [total.shape[-1]], *given, epsilon, False)
    return _with_sum(op, result, total)


@operator("com.microsoft.SkipSimplifiedLayerNormalization")
def skip_rms_norm(
    op: Operation, value: Present, skip: Present, weight: Present, value_bias: Present | None = None
) -> Any:
    total = sum_of(op, value, value_bias, skip)
    epsilon = op.attributes.number("epsilon", 1e-12)
    result = op.call(aten.rms_norm.default, total, [total.shape[-1]], op.tensor(weight), epsilon)
    return _with_sum(op, result, total)


def _with_sum(op: Operation, result: Tensor, total: Tensor) -> Any:
    """Mean and deviation, which only training reads, are values that nothing can read."""
    return (result, None, None, total) if op.outputs > 1 else result


@operator("SimplifiedLayerNormalization")
def simplified_layer_norm(op: Operation, value: Present, weight: Present) -> Tensor:
    """ONNX Runtime's name for an RMS norm, which it keeps in the standard domain."""
    if op.outputs > 1:
        raise op.refuse("SimplifiedLayerNormalization with its deviation as an output is not imported")
    return rms_norm(op, value, weight)


@operator("com.microsoft.EmbedLayerNormalization")
def embedding_layer_norm(
    op: Operation, ids: Present, segments: Value, words: Present, positions: Present, segment_rows: Value,
    weight: Present, bias: Present, mask: Present | None = None, position_ids: Present | None = None,
) -> Any:  # fmt: skip
    """The layer norm of the sum of three embeddings, how many tokens of each row the mask keeps, and the sum.

    Without `position_ids` tokens have the first rows of `positions`.
    """
    op.attributes.ignore("mask_index_type")
    ids = op.tensor(ids)
    batch, length = ids.shape
    total = op.call(aten.embedding.default, words, ids)
    if position_ids is None:
        rows = op.call(aten.slice.Tensor, positions, 0, 0, length)
        total = op.call(aten.add.Tensor, total, op.call(aten.unsqueeze.default, rows, 0))
    else:
        total = op.call(aten.add.Tensor, total, op.call(aten.embedding.default, positions, position_ids))
    if segments is not None and segment_rows is not None:
        total = op.call(aten.add.Tensor, total, op.call(aten.embedding.default, segment_rows, segments))
    given = [op.tensor(item) for item in (weight, bias)]
    epsilon = op.attributes.number("epsilon", 1e-12)
    result = op.call(aten.layer_norm.default, total, [total.shape[-1]], *given, epsilon, False)
    if op.outputs == 1:
        return result
    if mask is None:
        kept = op.call(aten.full.default, [batch], 0, dtype=torch.int32)
    else:
        ones = op.call(aten.eq.Scalar, mask, 1)
        kept = op.call(aten.sum.dim_IntList, ones, [1], False, dtype=torch.int32)
    return result, kept, total


def sum_of(op: Operation, value: Present, *others: Value) -> Tensor:
    """Of those that are there."""
    total = op.tensor(value)
    for other in others:
        if other is not None:
            total = op.call(aten.add.Tensor, total, op.tensor(other))
    return total
