"""Layer norm, as files of opsets before 17 and TensorFlow write it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.capture.raising.composites import near, rank
from graphopt.propagate import shape_key
from graphopt.rewrite import RewritePass, Rule

aten = torch.ops.aten


def pattern_layer_norm(x: Any, w: Any, b: Any, axes: Any, two: Any, epsilon: Any) -> Any:
    centred = aten.sub.Tensor(x, aten.mean.dim(x, axes, True))
    variance = aten.mean.dim(aten.pow.Tensor_Scalar(centred, two), axes, True)
    root = aten.sqrt.default(aten.add.Tensor(variance, epsilon))
    return aten.add.Tensor(aten.mul.Tensor(aten.div.Tensor(centred, root), w), b)


def rewrite_layer_norm(x: Any, w: Any, b: Any, axes: Any, two: Any, epsilon: Any) -> Any:
    return aten.layer_norm.default(x, [w.node.meta["val"].shape[0]], w, b, epsilon, False)


def _refusal(x: Any, w: Any, b: Any, axes: Any, epsilon: Any) -> str | None:
    last = shape_key(x.meta["val"])[-1]
    if list(axes) not in ([rank(x) - 1], [-1]) or not isinstance(epsilon, float):
        return "it is no mean over the last axis"
    if any(rank(item) != 1 or shape_key(item.meta["val"])[0] != last for item in (w, b)) or not isinstance(last, int):
        return "weight or bias is not one of the last axis"
    return None


@dataclass(frozen=True)
class LayerNorm(Rule):
    """w (x - mean) / sqrt(variance + epsilon) + b over the last axis."""

    pattern: ClassVar[Any] = staticmethod(pattern_layer_norm)
    rewrite: ClassVar[Any] = staticmethod(rewrite_layer_norm)

    def check(self, x: Any, w: Any, b: Any, axes: Any, two: Any, epsilon: Any) -> str | None:
        return _refusal(x, w, b, axes, epsilon) if near(two, 2) else "it is no mean of squares"


def pattern_factored(x: Any, w: Any, b: Any, axes: Any, epsilon: Any) -> Any:
    mean = aten.mean.dim(x, axes, True)
    centred = aten.sub.Tensor(x, mean)
    variance = aten.mean.dim(aten.mul.Tensor(centred, centred), axes, True)
    factor = aten.mul.Tensor(aten.reciprocal.default(aten.sqrt.default(aten.add.Tensor(variance, epsilon))), w)
    return aten.add.Tensor(aten.mul.Tensor(x, factor), aten.sub.Tensor(b, aten.mul.Tensor(mean, factor)))


def rewrite_factored(x: Any, w: Any, b: Any, axes: Any, epsilon: Any) -> Any:
    return aten.layer_norm.default(x, [w.node.meta["val"].shape[0]], w, b, epsilon, False)


@dataclass(frozen=True)
class FactoredLayerNorm(Rule):
    """x f + (b - mean f) with f = w / sqrt(variance + epsilon), as TensorFlow computes it."""

    pattern: ClassVar[Any] = staticmethod(pattern_factored)
    rewrite: ClassVar[Any] = staticmethod(rewrite_factored)

    def check(self, x: Any, w: Any, b: Any, axes: Any, epsilon: Any) -> str | None:
        return _refusal(x, w, b, axes, epsilon)


@dataclass(frozen=True)
class RaiseLayerNorm(RewritePass):
    """Layer norm in one node."""

    name: ClassVar[str] = "raising"
    rules: ClassVar[tuple[type[Rule], ...]] = (LayerNorm, FactoredLayerNorm)
