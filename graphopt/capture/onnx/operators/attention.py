"""Operators of opset 23 that stand for whole parts of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import dtype_of
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scores:
    """What is done to the products of queries and keys before and after their softmax."""

    scale: float | None
    softcap: float
    precision: torch.dtype | None
    mode: int


@operator("Attention")
def attention(
    op: Operation, query: Present, key: Present, value: Present, mask: Value = None, past_key: Value = None,
    past_value: Value = None, lengths: Value = None,
) -> Any:  # fmt: skip
    """query, key, value [B, H, S, E] or [B, S, H E]; lengths [B]: the keys of each row that are no padding."""
    attributes = op.attributes
    precision = attributes.integer("softmax_precision")
    scores = _Scores(
        attributes.number("scale", 0.0) or None,
        attributes.number("softcap", 0.0),
        dtype_of(precision, "the softmax") if precision else None,
        attributes.integer("qk_matmul_output_mode"),
    )
    flat = query.ndim == 3
    heads = attributes.integer("q_num_heads"), attributes.integer("kv_num_heads")
    q, k, v = op.tensor(query), op.tensor(key), op.tensor(value)
    if flat:
        if not all(heads):
            raise op.refuse("Attention of three axes needs q_num_heads and kv_num_heads")
        q, k, v = split_heads(op, q, heads[0]), split_heads(op, k, heads[1]), split_heads(op, v, heads[1])
    if (past_key is None) != (past_value is None) or (past_key is not None and lengths is not None):
        raise op.refuse("Attention takes past_key and past_value together, and no nonpad_kv_seqlen with them")
    past: Any = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = op.call(aten.cat.default, [past_key, k], 2), op.call(aten.cat.default, [past_value, v], 2)
    result, products = _attended(op, q, k, v, mask, past, lengths, scores)
    if flat:
        result = merge_heads(op, result)
    return (result, k, v, products)[: op.outputs] if op.outputs > 1 else result


def _attended(
    op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Value, past: Any, lengths: Value, scores: _Scores
) -> tuple[Tensor, Tensor | None]:
    """The attended values, and the scores where they are an output."""
    causal = bool(op.attributes.integer("is_causal"))
    windows = op.attributes.integer("left_window_size", -1), op.attributes.integer("right_window_size", -1)
    grouped = not statically_known_true(q.shape[1] == k.shape[1])
    explicit = bool(scores.softcap) or op.outputs == 4
    plain = mask is None and lengths is None and windows == (-1, -1) and isinstance(past, int) and past == 0
    if plain and not explicit:
        return _fused(op, q, k, v, None, causal, scores.scale, grouped), None
    allowed = _allowed(op, q, k, past, lengths, causal, windows)
    bias = _bias(op, k, mask, allowed, explicit)
    if not explicit:
        return _fused(op, q, k, v, bias, False, scores.scale, grouped), None
    return _explicit(op, q, k, v, bias, scores, grouped)


def _fused(
    op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Value, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    extra: dict[str, Any] = {"scale": scale} if scale is not None else {}
    if grouped:
        extra["enable_gqa"] = True
    return op.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, **extra)


def _allowed(
    op: Operation, q: Tensor, k: Tensor, past: Any, lengths: Value, causal: bool, windows: tuple[int, int]
) -> Tensor | None:
    """Which keys each query may see: [S, T] or, with lengths, [B, 1, S, T]; None for all of them.

    Query i stands behind the `past` keys, or at the end of those that are no padding.
    """
    left, right = windows
    keys = op.call(aten.arange.default, k.shape[2])
    bounds = []
    if lengths is not None:
        lengths = op.reshape(op.cast(lengths, torch.int64), [-1, 1, 1, 1])
        bounds.append(op.call(aten.lt.Tensor, keys, lengths))
    if causal or left >= 0 or right >= 0:
        places = op.reshape(op.call(aten.arange.default, q.shape[2]), [-1, 1])
        offset = past if lengths is None else op.call(aten.sub.Tensor, lengths, q.shape[2])
        places = op.call(aten.add.Tensor, places, offset)
        if causal:
            bounds.append(op.call(aten.le.Tensor, keys, places))
        if left >= 0:
            bounds.append(op.call(aten.ge.Tensor, keys, op.call(aten.sub.Tensor, places, left)))
        if right >= 0:
            bounds.append(op.call(aten.le.Tensor, keys, op.call(aten.add.Tensor, places, right)))
    return reduce(lambda a, b: op.call(aten.bitwise_and.Tensor, a, b), bounds) if bounds else None


def _bias(op: Operation, k: Tensor, mask: Value, allowed: Tensor | None, as_number: bool) -> Tensor | None:
    """The mask, with -inf or False for keys that it is too short for and those that are not allowed."""
    if mask is None:
        return allowed if allowed is None or not as_number else _number(op, allowed, k.dtype)
    mask = op.tensor(mask)
    is_bool = mask.dtype == torch.bool
    missing = k.shape[2] - mask.shape[-1]
    if not statically_known_true(missing == 0):
        mask = op.call(aten.constant_pad_nd.default, mask, [0, missing], False if is_bool else float("-inf"))
    if mask.ndim == 1:
        mask = op.call(aten.unsqueeze.default, mask, 0)
    if is_bool:
        both = mask if allowed is None else op.call(aten.bitwise_and.Tensor, mask, allowed)
        return _number(op, both, k.dtype) if as_number else both
    return mask if allowed is None else op.call(aten.add.Tensor, mask, _number(op, allowed, mask.dtype))


def _number(op: Operation, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True, otherwise -inf."""
    zeros = op.call(aten.zeros_like.default, mask, dtype=dtype)
    return op.call(aten.masked_fill.Scalar, zeros, op.call(aten.bitwise_not.default, mask), float("-inf"))


def _explicit(
    op: Operation, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: _Scores, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Attention whose scores are capped or an output; rows without a key give zeros."""
    if grouped:
        k, v = (_repeated(op, side, q.shape[1] // k.shape[1]) for side in (k, v))
    scale = float(q.shape[-1]) ** -0.5 if scores.scale is None else scores.scale
    q, k = (op.call(aten.mul.Tensor, side, scale**0.5) for side in (q, k))
    raw = op.call(aten.matmul.default, q, op.call(aten.transpose.int, k, 2, 3))
    capped = raw
    if scores.softcap:
        bent = op.call(aten.tanh.default, op.call(aten.div.Tensor, raw, scores.softcap))
        capped = op.call(aten.mul.Tensor, bent, scores.softcap)
    biased = capped if bias is None else op.call(aten.add.Tensor, capped, bias)
    wide = biased if scores.precision is None else op.cast(biased, scores.precision)
    chances = op.cast(op.call(aten.softmax.int, wide, -1), q.dtype)
    if bias is not None:
        empty = op.call(aten.eq.Scalar, op.call(aten.amax.default, bias, [-1], True), float("-inf"))
        chances = op.call(aten.masked_fill.Scalar, chances, empty, 0.0)
    outputs = (raw, capped, biased, chances)
    if not 0 <= scores.mode < len(outputs):
        raise op.refuse(f"qk_matmul_output_mode {scores.mode} does not exist")
    return op.call(aten.matmul.default, chances, v), outputs[scores.mode]


def _repeated(op: Operation, value: Tensor, times: Any) -> Tensor:
    """[B, H times, S, E] of [B, H, S, E]: each head for as many queries, one after the other."""
    batch, heads, length, width = value.shape
    wide = op.call(aten.unsqueeze.default, value, 2)
    wide = op.call(aten.expand.default, wide, [batch, heads, times, length, width])
    return op.reshape(wide, [batch, heads * times, length, width])


def split_heads(op: Operation, value: Tensor, count: int) -> Tensor:
    """[B, H, S, E] of [B, S, H E]."""
    batch, length, width = value.shape
    return op.call(aten.transpose.int, op.reshape(value, [batch, length, count, width // count]), 1, 2)


def merge_heads(op: Operation, value: Tensor) -> Tensor:
    """[B, S, H E] of [B, H, S, E]."""
    turned = op.call(aten.transpose.int, value, 1, 2)
    return op.reshape(turned, [turned.shape[0], turned.shape[1], turned.shape[2] * turned.shape[3]])
