"""com.microsoft.GroupQueryAttention: the attention of decoders that share keys and values among query heads.

Source: ONNX Runtime's contributed operators (docs/ContribOperators.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.attention import merge_heads, split_heads
from graphopt.capture.onnx.operators.rotary import rotated, widened
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Placing:
    """Where the new tokens of each row lie among its keys, in a cache of `room` places of which `most` are used.

    first: number of the first new token, a size for all rows or [B]. counts: how many keys a row has, [B]; None where
    all rows have as many as there are places, so that the cache only grows.
    """

    first: Any
    counts: Tensor | None
    room: Any
    most: Any


@operator("com.microsoft.GroupQueryAttention")
def group_query_attention(
    op: Operation, query: Present, key: Value, value: Value, past_key: Value, past_value: Value, lengths: Present,
    total: Present, cos: Value = None, sin: Value = None, position_ids: Value = None, added: Value = None,
    sink: Value = None,
) -> Any:  # fmt: skip
    """query [B, S, H E], key and value [B, S, K E], or all in query; past and present [B, K, P, E].

    `lengths` [B] is the number of keys of each row after this step, less one, and `total` the largest of them. Rows
    of the result behind a row's length are unspecified. In a first step, without a past, ids count up from 0 or more.
    """
    _refuse_kinds(op)
    q, k, v = _heads(op, query, key, value)
    length = q.shape[2]
    if past_key is None or past_value is None:
        placing = Placing(0, None, length, length)
    else:
        placing = _placing(op, op.tensor(past_key), length, op.tensor(lengths), total)
    if op.attributes.integer("do_rotary"):
        q, k = _turned(op, (q, k), placing, cos, sin, position_ids)
    if past_key is not None and past_value is not None:
        k, v = (_cached(op, op.tensor(past), x, placing) for past, x in ((past_key, k), (past_value, v)))
    result = merge_heads(
        op, _attended(op, q, _used(op, k, placing), _used(op, v, placing), lengths, placing, added, sink)
    )
    return (result, k, v) if op.outputs > 1 else result


def _refuse_kinds(op: Operation) -> None:
    """What quantized, windowed and inspected caches need; each attribute has a value that asks for none of it."""
    attributes = op.attributes
    attributes.ignore("kv_cache_bit_width", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon")
    for name in ("k_quant_type", "v_quant_type"):
        if attributes.text(name, "NONE") != "NONE":
            raise op.refuse(f"{name} is not imported; build the model with a cache of floats")
    if attributes.integer("sliding_window_cache"):
        raise op.refuse("sliding_window_cache is not imported; build the model with a cache of all tokens")
    if attributes.integer("qk_output") or op.outputs > 3:
        raise op.refuse("scores as an output (qk_output) are not imported; build the model without them")


def _heads(op: Operation, query: Present, key: Value, value: Value) -> tuple[Tensor, Tensor, Tensor]:
    heads, shared = op.attributes.integer("num_heads"), op.attributes.integer("kv_num_heads")
    if heads < 1 or shared < 1 or heads % shared:
        raise op.refuse(f"num_heads {heads} is no multiple of kv_num_heads {shared}; the file is damaged")
    if key is not None and value is not None:
        return (
            split_heads(op, op.tensor(query), heads),
            split_heads(op, op.tensor(key), shared),
            split_heads(op, op.tensor(value), shared),
        )
    batch, length, width = query.shape
    all_heads = op.reshape(query, [batch, length, heads + 2 * shared, width // (heads + 2 * shared)])
    turned = op.call(aten.transpose.int, all_heads, 1, 2)
    q, k, v = op.parts(aten.split_with_sizes.default, turned, [heads, shared, shared], 1)
    return q, k, v


def _placing(op: Operation, past: Tensor, length: Any, lengths: Tensor, total: Present) -> Placing:
    """Rows of a batch end at places of their own; one row has as many keys as there are in all."""
    (most,) = op.sizes(total, "total_sequence_length")
    held = past.shape[2]
    grows = statically_known_true(most == held + length)
    if not grows and not statically_known_true(most <= held):
        raise op.refuse(
            f"total_sequence_length is {most} and the cache holds {held} tokens, which leaves open whether it grows by "
            f'{length} or has room for them; name the size in dynamic_shapes, as in {{"attention_mask": '
            '{1: "past_sequence_length + sequence_length"}}, or "past_sequence_length" for a cache with room'
        )
    if grows and statically_known_true(past.shape[0] == 1):
        return Placing(held, None, most, most)
    counts = op.call(aten.add.Tensor, op.cast(lengths, torch.int64), 1)
    first = op.call(aten.clamp.default, op.call(aten.sub.Tensor, counts, length), 0)
    return Placing(first, counts, most if grows else held, most)


def _turned(
    op: Operation, parts: tuple[Tensor, Tensor], placing: Placing, cos: Value, sin: Value, position_ids: Value
) -> list[Tensor]:
    if cos is None or sin is None:
        raise op.refuse("do_rotary needs cos_cache and sin_cache; the file is damaged")
    positions = _numbers(op, placing, parts[0].shape[2]) if position_ids is None else position_ids
    interleaved = bool(op.attributes.integer("rotary_interleaved"))
    waves = [op.call(aten.embedding.default, op.tensor(rows), positions) for rows in (cos, sin)]
    wide = [widened(op, wave, interleaved=interleaved) for wave in waves]
    return [rotated(op, part, *wide, interleaved=interleaved) for part in parts]


def _numbers(op: Operation, placing: Placing, length: Any) -> Tensor:
    """Of the new tokens: [B, S], or [1, S] where all rows have the same."""
    if isinstance(placing.first, Tensor):
        first = op.call(aten.unsqueeze.default, placing.first, 1)
        return op.call(aten.add.Tensor, op.call(aten.arange.default, length, dtype=torch.int64), first)
    end = placing.first + length
    numbers = op.call(aten.arange.start, placing.first, end, dtype=torch.int64)
    return op.call(aten.unsqueeze.default, numbers, 0)


def _cached(op: Operation, past: Tensor, new: Tensor, placing: Placing) -> Tensor:
    """The keys of each row from place 0 on; behind them places of the past, which nothing reads."""
    joined = op.call(aten.cat.default, [past, new], 2)
    if placing.counts is None:
        return joined
    places = op.call(aten.arange.default, placing.room, dtype=torch.int64)
    first, count = (op.call(aten.unsqueeze.default, item, 1) for item in (placing.first, placing.counts))
    shifted = op.call(aten.add.Tensor, op.call(aten.sub.Tensor, places, first), past.shape[2])
    begun, going = op.call(aten.ge.Tensor, places, first), op.call(aten.lt.Tensor, places, count)
    is_new = op.call(aten.logical_and.default, begun, going)
    source = op.call(aten.where.self, is_new, shifted, places)
    for axis in (1, 3):
        source = op.call(aten.unsqueeze.default, source, axis)
    batch, heads, _, width = past.shape
    chosen = op.call(aten.expand.default, source, [batch, heads, placing.room, width])
    return op.call(aten.gather.default, joined, 2, chosen)


def _used(op: Operation, cached: Tensor, placing: Placing) -> Tensor:
    if placing.room is placing.most:
        return cached
    return op.call(aten.slice.Tensor, cached, 2, 0, placing.most)


def _attended(
    op: Operation, q: Tensor, k: Tensor, v: Tensor, lengths: Present, placing: Placing, added: Value, sink: Value
) -> Tensor:
    causal, window = bool(op.attributes.integer("causal", 1)), op.attributes.integer("local_window_size", -1)
    softcap, scale = op.attributes.number("softcap", 0.0), op.attributes.number("scale", 0.0)
    if window > 0 and not causal:
        raise op.refuse("local_window_size without causal is not imported; the file is damaged")
    if op.attributes.integer("smooth_softmax") == 1 and sink is None:
        sink = op.call(aten.full.default, [q.shape[1]], 0.0, dtype=q.dtype)
    plain = not softcap and sink is None and added is None
    extra: dict[str, Any] = {"scale": scale} if scale else {}
    if not statically_known_true(q.shape[1] == k.shape[1]):
        extra["enable_gqa"] = True
    attention = aten.scaled_dot_product_attention.default
    if plain and causal and window <= 0 and isinstance(placing.first, int) and placing.first == 0:
        return op.call(attention, q, k, v, None, 0.0, True, **extra)
    kept = _causal(op, q, placing, window) if causal else _within(op, k, lengths)
    if plain:
        return op.call(attention, q, k, v, kept, 0.0, False, **extra)
    if not softcap and sink is None:
        assert added is not None
        return op.call(attention, q, k, v, _masked(op, op.tensor(added), kept), 0.0, False, **extra)
    return _written_out(op, (q, k, v), kept, added, sink)


def _causal(op: Operation, q: Tensor, placing: Placing, window: int) -> Tensor | None:
    """Which keys a query sees, [B, 1, S, T]: those up to its own, with a window that many of them."""
    if q.shape[2] == 1 and placing.counts is None and window <= 0:
        return None
    own = _numbers(op, placing, q.shape[2])
    for axis in (1, 3):
        own = op.call(aten.unsqueeze.default, own, axis)
    places = op.call(aten.arange.default, placing.most, dtype=torch.int64)
    kept = op.call(aten.le.Tensor, places, own)
    if window > 0:
        near = op.call(aten.gt.Tensor, places, op.call(aten.sub.Tensor, own, window))
        kept = op.call(aten.logical_and.default, kept, near)
    return kept


def _within(op: Operation, k: Tensor, lengths: Present) -> Tensor | None:
    """Which keys a row has, [B, 1, 1, T]."""
    if k.shape[0] == 1:
        return None
    last = op.tensor(lengths)
    for _ in range(3):
        last = op.call(aten.unsqueeze.default, last, 1)
    return op.call(aten.le.Tensor, op.call(aten.arange.default, k.shape[2], dtype=last.dtype), last)


def _masked(op: Operation, scores: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return scores
    low = op.call(aten.full.default, [], -math.inf, dtype=scores.dtype)
    return op.call(aten.where.self, kept, scores, low)


def _written_out(
    op: Operation, parts: tuple[Tensor, Tensor, Tensor], kept: Tensor | None, added: Value, sink: Value
) -> Tensor:
    """Scores in (-softcap, softcap), and a softmax with one more score, `sink` [H], whose weight goes nowhere."""
    q, *shared = parts
    k, v = (_repeated(op, item, q.shape[1]) for item in shared)
    softcap, scale = op.attributes.number("softcap", 0.0), op.attributes.number("scale", 0.0)
    scores = op.call(aten.matmul.default, q, op.call(aten.transpose.int, k, -2, -1))
    scores = op.call(aten.mul.Tensor, scores, scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        capped = op.call(aten.tanh.default, op.call(aten.div.Tensor, scores, softcap))
        scores = op.call(aten.mul.Tensor, capped, softcap)
    if added is not None:
        scores = op.call(aten.add.Tensor, scores, op.tensor(added))
    scores = _masked(op, scores, kept)
    if sink is None:
        return op.call(aten.matmul.default, op.call(aten.softmax.int, scores, -1), v)
    batch, heads, rows, columns = scores.shape
    more = op.call(aten.expand.default, op.reshape(sink, [1, heads, 1, 1]), [batch, heads, rows, 1])
    weights = op.call(aten.softmax.int, op.call(aten.cat.default, [scores, more], -1), -1)
    return op.call(aten.matmul.default, op.call(aten.slice.Tensor, weights, -1, 0, columns), v)


def _repeated(op: Operation, value: Tensor, heads: int) -> Tensor:
    """[B, H, T, E] of [B, K, T, E], every head H / K times."""
    batch, shared, length, width = value.shape
    if shared == heads:
        return value
    each = op.call(
        aten.expand.default, op.call(aten.unsqueeze.default, value, 2), [batch, shared, heads // shared, length, width]
    )
    return op.reshape(each, [batch, heads, length, width])
