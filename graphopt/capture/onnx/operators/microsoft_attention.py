"""Attention as ONNX Runtime's optimizers write it, in the domain com.microsoft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.attention import merge_heads, split_heads
from graphopt.capture.onnx.operators.microsoft import sum_of
from graphopt.capture.onnx.operators.quantization import dequantized, held_tensor
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_MASKED = -10000.0  # what is added to the score of a key that the mask leaves out


@operator("com.microsoft.Attention")
def attention(
    op: Operation, value: Present, weight: Present, bias: Value = None, mask: Value = None, past: Value = None,
    added: Value = None,
) -> Any:  # fmt: skip
    """Self-attention of value [B, S, D] with the three projections in one weight [D, N]; past is [2, B, H, P, E]."""
    _refuse(op, "do_rotary", "past_present_share_buffer", "rotary_embedding_dim")
    return _self_attention(op, op.tensor(value), op.tensor(weight), bias, mask, past, added)


@operator("com.microsoft.QAttention")
def quantized_attention(
    op: Operation, value: Present, weight: Present, bias: Present, scale: Present, weight_scale: Present,
    mask: Value = None, zero: Value = None, weight_zero: Value = None, past: Value = None,
) -> Any:  # fmt: skip
    """The same of codes, with one weight scale or one for each column."""
    _refuse(op, "do_rotary", "past_present_share_buffer")
    numbers = dequantized(op, value, scale, zero), dequantized(op, weight, weight_scale, weight_zero, axis=1)
    return _self_attention(op, *numbers, bias, mask, past, None)


def _self_attention(
    op: Operation, value: Tensor, weight: Tensor, bias: Value, mask: Value, past: Value, added: Value
) -> Any:
    heads, width = op.attributes.integer("num_heads"), weight.shape[1] // 3
    widths = op.attributes.integers("qkv_hidden_sizes") or [width] * 3
    q, k, v = (split_heads(op, part, heads) for part in _projections(op, value, weight, bias, widths))
    if past is not None:
        past = op.tensor(past)
        k, v = (_behind(op, op.call(aten.select.int, past, 0, n), x) for n, x in enumerate((k, v)))
    result = _attended(op, q, k, v, mask, added, past is not None)
    return (result, op.call(aten.stack.default, [k, v])) if op.outputs > 1 else result


def _projections(op: Operation, value: Tensor, weight: Tensor, bias: Value, widths: list[int]) -> Sequence[Tensor]:
    """Three linear layers, which is what the optimizers put together; a causal model had one, as GPT-2."""
    if weight.node.op != "get_attr" or op.attributes.integer("unidirectional"):
        return op.parts(aten.split_with_sizes.default, _linear(op, value, weight, bias), widths, -1)
    biases = [None] * 3 if bias is None else _split(op, op.tensor(bias), widths)
    return [_linear(op, value, part, added) for part, added in zip(_split(op, weight, widths), biases, strict=True)]


def _linear(op: Operation, value: Tensor, weight: Tensor, bias: Value) -> Tensor:
    turned = op.emitter.transposed(weight) or op.call(aten.permute.default, weight, [1, 0])
    return op.call(aten.linear.default, value, turned, *(() if bias is None else (op.tensor(bias),)))


def _split(op: Operation, value: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of the last axis, each held by itself where the file holds the whole, so that passes see three weights."""
    held = held_tensor(op, value)
    if held is None:
        return list(op.parts(aten.split_with_sizes.default, value, sizes, -1))
    names = [f"{value.node.target}_{part}" for part in ("query", "key", "value")]
    parts = zip(names, held.split(sizes, -1), strict=True)
    targets = [op.emitter.weights.add(name, part.contiguous(), trainable=True) for name, part in parts]
    return [op.emitter.attribute(target) for target in targets]


@operator("com.microsoft.MultiHeadAttention")
def multi_head_attention(
    op: Operation, query: Present, key: Value = None, value: Value = None, bias: Value = None, mask: Value = None,
    added: Value = None, past_key: Value = None, past_value: Value = None,
) -> Any:  # fmt: skip
    """query [B, S, D], key [B, T, D] and value [B, T, N], or both of the latter by head [B, H, T, E].

    Or packed: all three in query [B, S, H, 3, E], or key and value in key [B, T, H, 2, E].
    """
    if op.outputs > 3:
        raise op.refuse("MultiHeadAttention with its scores as an output is not imported; build the model without them")
    heads = op.attributes.integer("num_heads")
    q, k, v = _unpacked(op, op.tensor(query), key, value)
    if bias is not None:
        sizes = [q.shape[-1], q.shape[-1], v.shape[-1] if v.ndim == 3 else q.shape[-1]]
        biases = _split(op, op.tensor(bias), sizes)
        q, k, v = (x if x.ndim == 4 else sum_of(op, x, b) for x, b in zip((q, k, v), biases, strict=True))
    q, k, v = (x if x.ndim == 4 else split_heads(op, x, heads) for x in (q, k, v))
    if past_key is not None and past_value is not None:
        k, v = _behind(op, past_key, k), _behind(op, past_value, v)
    result = _attended(op, q, k, v, mask, added, past_key is not None)
    return (result, k, v) if op.outputs > 1 else result


def _unpacked(op: Operation, query: Tensor, key: Value, value: Value) -> tuple[Tensor, Tensor, Tensor]:
    if key is None:
        return _part(op, query, 0), _part(op, query, 1), _part(op, query, 2)
    if value is None:
        return query, _part(op, op.tensor(key), 0), _part(op, op.tensor(key), 1)
    return query, op.tensor(key), op.tensor(value)


def _part(op: Operation, packed: Tensor, number: int) -> Tensor:
    """[B, S, H E] of [B, S, H, 2 or 3, E]."""
    if packed.ndim != 5:
        raise op.refuse(f"MultiHeadAttention takes packed inputs with 5 axes, not {packed.ndim}; the file is damaged")
    chosen = op.call(aten.select.int, packed, 3, number)
    return op.reshape(chosen, [*chosen.shape[:2], chosen.shape[2] * chosen.shape[3]])


def _behind(op: Operation, past: Present, value: Tensor) -> Tensor:
    return op.call(aten.cat.default, [past, value], 2)


def _attended(op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Value, added: Value, has_past: bool) -> Tensor:
    """[B, S, H E] of q [B, H, S, D], k [B, H, T, D], v [B, H, T, E]; both masks may be left out."""
    scale, causal = op.attributes.number("scale", 0.0), bool(op.attributes.integer("unidirectional"))
    left_out = op.attributes.number("mask_filter_value", _MASKED)
    scores = None if mask is None else _mask_scores(op, op.tensor(mask), k, left_out)
    if added is not None:
        scores = sum_of(op, added, scores)
    if causal and (scores is not None or has_past):
        later = _later(op, q.shape[2], k.shape[2], q.dtype)
        scores = sum_of(op, later, scores)
        causal = False
    extra = {"scale": scale} if scale else {}
    result = op.call(aten.scaled_dot_product_attention.default, q, k, v, scores, 0.0, causal, **extra)
    return merge_heads(op, result)


def _mask_scores(op: Operation, mask: Tensor, k: Tensor, left_out: float) -> Tensor:
    """What a mask adds to scores.

    [B] ends of the kept keys of each row, or [2 B] ends and then starts; or [B, T], [B, S, T] or [B, 1, S, T], positive
    where kept.
    """
    kept = _between(op, mask, k) if mask.ndim == 1 else op.call(aten.gt.Scalar, mask, 0)
    axes = {1: (1, 1), 2: (1, 1), 3: (1,), 4: ()}.get(mask.ndim)
    if axes is None:
        raise op.refuse(f"a mask with {mask.ndim} axes is not imported")
    for axis in axes:
        kept = op.call(aten.unsqueeze.default, kept, axis)
    one = op.call(aten.full.default, [], 0.0, dtype=k.dtype)
    other = op.call(aten.full.default, [], left_out, dtype=k.dtype)
    return op.call(aten.where.self, kept, one, other)


def _between(op: Operation, mask: Tensor, k: Tensor) -> Tensor:
    batch, numbers = k.shape[0], op.call(aten.arange.default, k.shape[2], dtype=mask.dtype)
    if statically_known_true(mask.shape[0] == batch):
        return op.call(aten.lt.Tensor, numbers, op.call(aten.unsqueeze.default, mask, 1))
    if not statically_known_true(mask.shape[0] == 2 * batch):
        raise op.refuse(
            f"a mask of {mask.shape[0]} numbers for {batch} rows is not imported; export a mask of [batch, keys]"
        )
    ends, starts = (
        op.call(aten.unsqueeze.default, half, 1)
        for half in op.parts(aten.split_with_sizes.default, mask, [batch, batch], 0)
    )
    early, late = op.call(aten.lt.Tensor, numbers, ends), op.call(aten.ge.Tensor, numbers, starts)
    return op.call(aten.logical_and.default, early, late)


def _later(op: Operation, rows: Any, columns: Any, dtype: torch.dtype) -> Tensor:
    """The type's lowest number for keys behind their query, of which the last ones are level with the last keys."""
    row = op.call(aten.unsqueeze.default, op.call(aten.arange.default, rows), 1)
    last = op.call(aten.add.Tensor, row, columns - rows)
    kept = op.call(aten.le.Tensor, op.call(aten.arange.default, columns), last)
    zero, lowest = (op.call(aten.full.default, [], value, dtype=dtype) for value in (0.0, torch.finfo(dtype).min))
    return op.call(aten.where.self, kept, zero, lowest)


def _refuse(op: Operation, *attributes: str) -> None:
    for name in attributes:
        if op.attributes.integer(name):
            raise op.refuse(f"{op.name} with {name} is not imported")
