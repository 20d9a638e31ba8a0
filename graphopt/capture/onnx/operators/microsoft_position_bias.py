"""com.microsoft.RelativePositionBias: what T5 adds to scores, by the distance between query and key.

Source: ONNX Runtime's contributed operators (docs/ContribOperators.md); the buckets are those of T5.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.quantization import held_tensor
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten


@operator("com.microsoft.RelativePositionBias")
def relative_position_bias(op: Operation, table: Present, rows: Present, columns: Present) -> Tensor:
    """[1, H, S, T] from a table of [buckets, H] numbers, which the file holds column after column."""
    held = held_tensor(op, table)
    if held is None or held.ndim != 2 or not isinstance(table, Tensor):
        raise op.refuse("a table that is computed is not imported; make it an initializer")
    buckets, heads = held.shape
    name = op.emitter.weights.add(
        f"{table.node.target}_rows", held.reshape(heads, buckets).t().contiguous(), trainable=True
    )
    (height,), (width,) = op.sizes(rows, "query_length"), op.sizes(columns, "key_length")
    keys = op.call(aten.arange.default, width, dtype=torch.int64)
    queries = op.call(aten.unsqueeze.default, op.call(aten.arange.default, height, dtype=torch.int64), 1)
    bucket = _bucket(op, op.call(aten.sub.Tensor, keys, queries), buckets)
    chosen = op.call(aten.embedding.default, op.emitter.attribute(name), bucket)
    return op.call(aten.unsqueeze.default, op.call(aten.permute.default, chosen, [2, 0, 1]), 0)


def _bucket(op: Operation, distance: Tensor, buckets: int) -> Tensor:
    """One for each small distance, then ever wider ones; a half of them for keys behind the query, or none."""

    def call(target: Any, *args: Any) -> Tensor:
        return op.call(target, *args)

    farthest = op.attributes.integer("max_distance", 128)
    first: Tensor | None = None
    if op.attributes.integer("is_bidirectional"):
        buckets //= 2
        first = call(aten.mul.Tensor, op.cast(call(aten.gt.Scalar, distance, 0), torch.int64), buckets)
        size = call(aten.abs.default, distance)
    else:
        size = call(aten.neg.default, call(aten.clamp.default, distance, None, 0))
    exact = buckets // 2
    far = op.cast(call(aten.clamp.default, size, exact), torch.float32)
    ratio = call(aten.div.Tensor, far, float(exact))
    steps = call(aten.div.Tensor, call(aten.log.default, ratio), math.log(farthest / exact))
    wide = op.cast(call(aten.mul.Tensor, steps, float(buckets - exact)), torch.int64)
    wide = call(aten.clamp.default, call(aten.add.Tensor, wide, exact), None, buckets - 1)
    found = call(aten.where.self, call(aten.lt.Scalar, size, exact), size, wide)
    return found if first is None else call(aten.add.Tensor, found, first)
