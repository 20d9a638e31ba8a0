"""Rotary position embedding: pairs of a head's elements turned by an angle that grows with the position."""

from __future__ import annotations

import sys

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.attention import merge_heads, split_heads
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@operator("RotaryEmbedding")
def rotary(op: Operation, value: Present, cos: Present, sin: Present, position_ids: Value = None) -> Tensor:
    """value [B, H, S, E] or [B, S, H E]; cos, sin [B, S, R / 2], or rows [M, R / 2] that position_ids [B, S] choose."""
    waves = [op.tensor(cos), op.tensor(sin)]
    if position_ids is not None:
        waves = [op.call(aten.embedding.default, rows, position_ids) for rows in waves]
    return _over_heads(op, op.tensor(value), waves)


@operator("com.microsoft.RotaryEmbedding")
def microsoft_rotary(op: Operation, value: Present, position_ids: Present, cos: Present, sin: Present) -> Tensor:
    """The same with the positions first, [B, S], or that of the first token alone, [1]."""
    if op.attributes.integer("is_packed_batching"):
        raise op.refuse("is_packed_batching is not imported; export the model without packed rows")
    if op.attributes.number("scale", 1.0) != 1:
        raise op.refuse("a scale is not imported, and ONNX Runtime does not apply it; multiply before or after")
    value, positions = op.tensor(value), op.tensor(position_ids)
    if positions.ndim == 1:
        numbers = op.call(aten.arange.default, value.shape[-2 if value.ndim == 4 else 1], dtype=torch.int64)
        positions = op.call(aten.unsqueeze.default, op.call(aten.add.Tensor, numbers, positions), 0)
    waves = [op.call(aten.embedding.default, op.tensor(rows), positions) for rows in (cos, sin)]
    return _over_heads(op, value, waves)


def _over_heads(op: Operation, value: Tensor, waves: list[Tensor]) -> Tensor:
    """`waves`: cos and sin, [B, S, R / 2]; R is the whole width of a head where no attribute says less."""
    width = op.attributes.integer("rotary_embedding_dim") or 2 * waves[0].shape[-1]
    heads, flat = op.attributes.integer("num_heads"), value.ndim == 3
    if flat:
        value = split_heads(op, value, heads or value.shape[-1] // width)
    cos, sin = (op.call(aten.unsqueeze.default, wave, 1) for wave in waves)
    result = rotated(op, value, cos, sin, interleaved=bool(op.attributes.integer("interleaved")))
    return merge_heads(op, result) if flat else result


def rotated(op: Operation, value: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """value [B, H, S, E] with its first R elements turned by cos, sin [B, 1, S, R / 2].

    A pair is element i and i + R / 2, or, interleaved, 2 i and 2 i + 1.
    """
    half, rest = cos.shape[-1], []
    if 2 * half != value.shape[-1]:
        value, *rest = op.parts(aten.split_with_sizes.default, value, [2 * half, value.shape[-1] - 2 * half], -1)
    if interleaved:
        left, right = (op.call(aten.slice.Tensor, value, -1, first, sys.maxsize, 2) for first in (0, 1))
    else:
        left, right = op.parts(aten.split.Tensor, value, half, -1)

    def times(a: Tensor, b: Tensor) -> Tensor:
        return op.call(aten.mul.Tensor, a, b)

    first = op.call(aten.sub.Tensor, times(left, cos), times(right, sin))
    second = op.call(aten.add.Tensor, times(right, cos), times(left, sin))
    if not interleaved:
        return op.call(aten.cat.default, [first, second, *rest], -1)
    pairs = op.call(aten.stack.default, [first, second], -1)
    turned = op.reshape(pairs, [*pairs.shape[:-2], 2 * half])
    return op.call(aten.cat.default, [turned, *rest], -1) if rest else turned
