"""How sure an answer is: numbers from 0 to 1 computed of logits [..., classes], by ATen calls on tensors or proxies.

- pmax: the largest probability (Kaya et al. 2019, "Shallow-Deep Networks", arXiv 1810.07052).
- margin: the largest probability less the second.
- entropy: 1 - entropy / log(classes) (Teerapittayanon et al. 2016, "BranchyNet", arXiv 1709.01686).
- cosine: of the embedding at this exit and at the one before (see `decisions`).
- gate: learned of the first three and of the entropy of squared probabilities (see `gate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten

TINY = 1e-12  # below which a probability counts as this in a logarithm


def pmax(logits: Any, classes: int) -> Any:
    return aten.amax.default(aten.softmax.int(logits, -1), [-1])


def margin(logits: Any, classes: int) -> Any:
    return _margin(aten.softmax.int(logits, -1))


def entropy(logits: Any, classes: int) -> Any:
    share = aten.mul.Tensor(_entropy(aten.softmax.int(logits, -1)), 1 / math.log(classes))
    return aten.clamp.default(aten.rsub.Scalar(share, 1), 0, 1)


def features(logits: Any) -> Any:
    """[samples, 4]: largest probability, entropy, margin, entropy of the squared probabilities made to sum to 1."""
    p = aten.softmax.int(logits, -1)
    squared = aten.mul.Tensor(p, p)
    squared = aten.div.Tensor(squared, aten.sum.dim_IntList(squared, [-1], True))
    return aten.stack.default([aten.amax.default(p, [-1]), _entropy(p), _margin(p), _entropy(squared)], -1)


def _entropy(p: Any) -> Any:
    logarithm = aten.log.default(aten.clamp_min.default(p, TINY))
    return aten.neg.default(aten.sum.dim_IntList(aten.mul.Tensor(p, logarithm), [-1]))


def _margin(p: Any) -> Any:
    largest = aten.topk.default(p, 2)[0]
    return aten.sub.Tensor(aten.select.int(largest, -1, 0), aten.select.int(largest, -1, 1))


CONFIDENCES: Mapping[str, Callable[[Any, int], Any]] = {"pmax": pmax, "margin": margin, "entropy": entropy}
