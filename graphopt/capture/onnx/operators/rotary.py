"""Rotary embeddings, standard and of com.microsoft, in the normal form of `graphopt.analysis.rotary`."""

from __future__ import annotations

import sys
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.attention import merge_heads, split_heads
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator("RotaryEmbedding")
def rotary(op: Operation, value: Present, cos: Present, sin: Present, position_ids: Value = None) -> Tensor:
    """value [B, S, H E] or [B, H, S, E]; cos, sin [B, S, R / 2], or [M, R / 2] with position_ids [B, S]."""
    value, waves = op.tensor(value), [op.tensor(cos), op.tensor(sin)]
    if value.ndim == 3 and not op.attributes.integer("num_heads"):
        raise op.refuse("RotaryEmbedding of three axes needs num_heads")
    if position_ids is not None:
        waves = [op.call(aten.embedding.default, rows, position_ids) for rows in waves]
    return _over_heads(op, value, waves)


@operator("com.microsoft.RotaryEmbedding")
def microsoft_rotary(op: Operation, value: Present, position_ids: Present, cos: Present, sin: Present) -> Tensor:
    """value [B, S, H E] or [B, H, S, E]; position_ids [B, S] or that of the first token; cos, sin [M, R / 2]."""
    if op.attributes.integer("is_packed_batching"):
        raise op.refuse("is_packed_batching is not imported; export the model without packed rows")
    if op.attributes.number("scale", 1.0) != 1:
        raise op.refuse("a scale is not imported, and ONNX Runtime does not apply it; multiply before or after")
    value, positions = op.tensor(value), op.tensor(position_ids)
    heads, part = op.attributes.integer("num_heads"), op.attributes.integer("rotary_embedding_dim")
    if part and not heads and value.ndim == 3:
        raise op.refuse("RotaryEmbedding of a part of each head needs num_heads")
    if positions.ndim == 1:
        numbers = op.call(aten.arange.default, value.shape[-2 if value.ndim == 4 else 1], dtype=torch.int64)
        positions = op.call(aten.unsqueeze.default, op.call(aten.add.Tensor, numbers, positions), 0)
    return _over_heads(op, value, [op.call(aten.embedding.default, op.tensor(rows), positions) for rows in (cos, sin)])


def _over_heads(op: Operation, value: Tensor, waves: list[Tensor]) -> Tensor:
    flat, interleaved = value.ndim == 3, bool(op.attributes.integer("interleaved"))
    heads, _ = op.attributes.integer("num_heads"), op.attributes.integer("rotary_embedding_dim")
    if flat:
        value = split_heads(op, value, heads or value.shape[-1] // (2 * waves[0].shape[-1]))
    cos, sin = (widened(op, wave, interleaved=interleaved) for wave in waves)
    result = rotated(op, value, cos, sin, interleaved=interleaved)
    return merge_heads(op, result) if flat else result


def widened(op: Operation, wave: Tensor, *, interleaved: bool) -> Tensor:
    """[B, 1, S, R] of [B, S, R / 2]: every number for both channels of its pair."""
    return op.call(aten.unsqueeze.default, _pairs(op, wave, wave, interleaved=interleaved), 1)


def rotated(op: Operation, value: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """value [B, H, S, E] with its first R channels turned by cos, sin [B, 1, S, R].

    A pair is channel i and i + R / 2, or, interleaved, 2 i and 2 i + 1.
    """
    width, rest = cos.shape[-1], None
    if width != value.shape[-1]:
        value, rest = _slice(op, value, 0, width), _slice(op, value, width, sys.maxsize)
    first = _slice(op, value, 0, sys.maxsize, 2) if interleaved else _slice(op, value, 0, width // 2)
    second = _slice(op, value, 1, sys.maxsize, 2) if interleaved else _slice(op, value, width // 2, sys.maxsize)
    quarter = _pairs(op, op.call(aten.neg.default, second), first, interleaved=interleaved)
    straight, across = op.call(aten.mul.Tensor, value, cos), op.call(aten.mul.Tensor, quarter, sin)
    result = op.call(aten.add.Tensor, straight, across)
    return result if rest is None else op.call(aten.cat.default, [result, rest], -1)


def _pairs(op: Operation, first: Tensor, second: Tensor, *, interleaved: bool) -> Tensor:
    """Both along the last axis, one behind the other or one channel of each in turn."""
    if not interleaved:
        return op.call(aten.cat.default, [first, second], -1)
    return op.reshape(op.call(aten.stack.default, [first, second], -1), [*first.shape[:-1], 2 * first.shape[-1]])


def _slice(op: Operation, value: Tensor, start: Any, stop: Any, step: int = 1) -> Tensor:
    return op.call(aten.slice.Tensor, value, value.ndim - 1, start, stop, step)
