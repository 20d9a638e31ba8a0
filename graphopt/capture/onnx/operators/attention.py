"""Operators of opset 23 that stand for whole parts of a transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator("Attention")
def attention(
    op: Operation, query: Present, key: Present, value: Present, mask: Value = None, past_key: Value = None,
    past_value: Value = None,
) -> Any:  # fmt: skip
    attributes = op.attributes
    if attributes.number("softcap", 0.0) or attributes.integer("qk_matmul_output_mode") or op.outputs == 4:
        raise op.refuse("Attention with softcap or with its scores as an output is not imported")
    attributes.ignore("softmax_precision")
    causal, scale = bool(attributes.integer("is_causal")), attributes.number("scale", 0.0) or None
    if causal and (mask is not None or past_key is not None):
        raise op.refuse("causal Attention with a mask or a past is not imported")
    flat = query.ndim == 3
    heads = attributes.integer("q_num_heads"), attributes.integer("kv_num_heads")
    q, k, v = op.tensor(query), op.tensor(key), op.tensor(value)
    if flat:
        q, k, v = split_heads(op, q, heads[0]), split_heads(op, k, heads[1]), split_heads(op, v, heads[1])
    if past_key is not None and past_value is not None:
        k, v = op.call(aten.cat.default, [past_key, k], 2), op.call(aten.cat.default, [past_value, v], 2)
    grouped = not statically_known_true(q.shape[1] == k.shape[1])
    extra = {"scale": scale} if scale is not None else {}
    if grouped:
        extra["enable_gqa"] = True
    result = op.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, **extra)
    if flat:
        result = merge_heads(op, result)
    return (result, k, v) if op.outputs > 1 else result


def split_heads(op: Operation, value: Tensor, count: int) -> Tensor:
    """[B, H, S, E] of [B, S, H E]."""
    batch, length, width = value.shape
    return op.call(aten.transpose.int, op.reshape(value, [batch, length, count, width // count]), 1, 2)


def merge_heads(op: Operation, value: Tensor) -> Tensor:
    """[B, S, H E] of [B, H, S, E]."""
    turned = op.call(aten.transpose.int, value, 1, 2)
    return op.reshape(turned, [turned.shape[0], turned.shape[1], turned.shape[2] * turned.shape[3]])
