"""Rotary embeddings, standard and of com.microsoft, in the normal form of `graphopt.analysis.rotary`."""

from __future__ import annotations

import sys
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.attention import split_heads
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator("RotaryEmbedding")
def rotary(op: Operation, value: Present, cos: Present, sin: Present, position_ids: Value = None) -> Tensor:
    """value [B, S, H E] or [B, H, S, E]; cos, sin [B, S, R / 2], or [M, R / 2] with position_ids [B, S]."""
    value, tables = op.tensor(value), (op.tensor(cos), op.tensor(sin))
    heads = op.attributes.integer("num_heads")
    if position_ids is not None:
        tables = _rows(op, tables, op.tensor(position_ids))
    if value.ndim == 4:
        return _rotated(op, value, *tables)
    if not heads:
        raise op.refuse("RotaryEmbedding of three axes needs num_heads")
    return _flat(op, _rotated(op, split_heads(op, value, heads), *tables))


@operator("com.microsoft.RotaryEmbedding")
def microsoft_rotary(op: Operation, value: Present, position_ids: Present, cos: Present, sin: Present) -> Tensor:
    """value [B, S, H E] or [B, H, S, E]; position_ids [B, S] or that of the first token; cos, sin [M, R / 2]."""
    if op.attributes.integer("is_packed_batching") or op.attributes.number("scale", 1.0) != 1:
        raise op.refuse("RotaryEmbedding is not imported with is_packed_batching or a scale")
    value, tables, positions = op.tensor(value), (op.tensor(cos), op.tensor(sin)), op.tensor(position_ids)
    heads, rotated = op.attributes.integer("num_heads"), op.attributes.integer("rotary_embedding_dim")
    if rotated and not heads and value.ndim == 3:
        raise op.refuse("RotaryEmbedding of a part of each head needs num_heads")
    flat = value.ndim == 3
    if flat:
        value = split_heads(op, value, heads or value.shape[-1] // (2 * tables[0].shape[-1]))
    if positions.ndim == 1:
        numbers = op.call(aten.arange.default, value.shape[2], dtype=torch.int64)
        positions = op.call(aten.unsqueeze.default, op.call(aten.add.Tensor, numbers, positions), 0)
    result = _rotated(op, value, *_rows(op, tables, positions))
    return _flat(op, result) if flat else result


def _rows(op: Operation, tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (op.call(aten.embedding.default, rows, positions) for rows in tables)
    return cos, sin


def _flat(op: Operation, value: Tensor) -> Tensor:
    turned = op.call(aten.transpose.int, value, 1, 2)
    return op.reshape(turned, [turned.shape[0], turned.shape[1], turned.shape[2] * turned.shape[3]])


def _rotated(op: Operation, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """value [B, H, S, E] with its first R channels turned; cos and sin are [B, S, R / 2]."""
    interleaved = bool(op.attributes.integer("interleaved"))
    width = op.attributes.integer("rotary_embedding_dim") or value.shape[-1]
    turned, rest = value, None
    if width != value.shape[-1]:
        turned, rest = _slice(op, value, 0, width), _slice(op, value, width, sys.maxsize)
    first = _slice(op, turned, 0, sys.maxsize, 2) if interleaved else _slice(op, turned, 0, width // 2)
    second = _slice(op, turned, 1, sys.maxsize, 2) if interleaved else _slice(op, turned, width // 2, sys.maxsize)
    quarter = _pairs(op, op.call(aten.neg.default, second), first, interleaved)
    cos, sin = (op.call(aten.unsqueeze.default, _pairs(op, wave, wave, interleaved), 1) for wave in (cos, sin))
    straight, across = op.call(aten.mul.Tensor, turned, cos), op.call(aten.mul.Tensor, quarter, sin)
    result = op.call(aten.add.Tensor, straight, across)
    return result if rest is None else op.call(aten.cat.default, [result, rest], -1)


def _pairs(op: Operation, first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """Both along the last axis, one behind the other or one channel of each in turn."""
    if not interleaved:
        return op.call(aten.cat.default, [first, second], -1)
    return op.reshape(op.call(aten.stack.default, [first, second], -1), [*first.shape[:-1], 2 * first.shape[-1]])


def _slice(op: Operation, value: Tensor, start: Any, stop: Any, step: int = 1) -> Tensor:
    return op.call(aten.slice.Tensor, value, value.ndim - 1, start, stop, step)
