"""Counts of token sequences."""

from __future__ import annotations

from functools import reduce

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten


@operator("TfIdfVectorizer")
def count_grams(op: Operation, value: Present) -> Tensor:
    """value [C] or [N, C] of token numbers -> one float for each known sequence of tokens, found with skips or not."""
    read = op.attributes
    pool, starts, places = (read.integers(name) for name in ("pool_int64s", "ngram_counts", "ngram_indexes"))
    weights, mode = read.numbers("weights"), read.text("mode", "")
    shortest, longest = read.integer("min_gram_length"), read.integer("max_gram_length")
    skips = read.integer("max_skip_count")
    if pool is None or not starts or not places or mode not in ("TF", "IDF", "TFIDF"):
        raise op.refuse("TfIdfVectorizer is only imported for tokens that are integers, with mode TF, IDF or TFIDF")
    flat = value.ndim == 1
    rows = op.reshape(value, [1, value.shape[0]]) if flat else op.tensor(value)
    width, parts = rows.shape[1], []
    if not isinstance(width, int):
        raise op.refuse("TfIdfVectorizer over a dynamic number of tokens is not imported; give that axis a number")
    for length, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), 1):
        grams = torch.tensor(pool[start:end], dtype=rows.dtype).reshape(-1, length)
        found = op.call(aten.full.default, [rows.shape[0], len(grams)], 0, dtype=torch.int64)
        steps = range(1, 2 if length == 1 else skips + 2)
        for step in steps if shortest <= length <= longest and len(grams) else ():
            if (windows := width - (length - 1) * step) > 0:
                found = op.call(aten.add.Tensor, found, _occurrences(op, rows, grams, windows, step))
        parts.append(found)
    counts = op.call(aten.cat.default, parts, 1)
    scores = op.cast(counts, torch.float32)
    if mode == "IDF":
        scores = op.cast(op.call(aten.gt.Scalar, counts, 0), torch.float32)
    if mode != "TF" and weights:
        held = op.emitter.weights.add("weights", torch.tensor(weights), trainable=False)
        scores = op.call(aten.mul.Tensor, scores, op.emitter.attribute(held))
    index = op.emitter.attribute(op.emitter.weights.add("places", torch.tensor(places), trainable=False))
    result = op.call(aten.full.default, [rows.shape[0], max(places) + 1], 0.0, dtype=torch.float32)
    result = op.call(aten.index_add.default, result, 1, index, scores)
    return op.reshape(result, [result.shape[1]]) if flat else result


def _occurrences(op: Operation, rows: Tensor, grams: torch.Tensor, windows: int, step: int) -> Tensor:
    """[N, grams]: how often each gram stands in a row with `step` from one token to the next."""
    same = []
    for place in range(grams.shape[1]):
        tokens = op.call(aten.slice.Tensor, rows, 1, place * step, place * step + windows)
        wanted = op.emitter.attribute(op.emitter.weights.add("grams", grams[:, place].contiguous(), trainable=False))
        same.append(op.call(aten.eq.Tensor, op.call(aten.unsqueeze.default, tokens, 2), wanted))
    every = reduce(lambda left, right: op.call(aten.bitwise_and.Tensor, left, right), same)
    return op.call(aten.sum.dim_IntList, every, [1])
