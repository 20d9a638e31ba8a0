"""Linear layers with bias, activations and RMS norm, as models and exporters write them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from graphopt.propagate import shape_key
from graphopt.rewrite import RewritePass, Rule

aten = torch.ops.aten


def near(value: Any, wanted: float) -> bool:
    """Whether a literal is `wanted` as far as float32 holds it."""
    return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)


def rank(value: Any) -> int:
    """The number of axes of a node's tensor; -1 for a literal."""
    return value.meta["val"].dim() if isinstance(value, Node) else -1


def _is_held(value: Node) -> bool:
    """Whether it is a weight, as numbers or as the codes that stand for them."""
    sources = value.all_input_nodes if value.target is torch.ops.graphopt.dequantize.default else [value]
    return all(source.op == "get_attr" for source in sources)


def pattern_linear(x: Any, w: Any, b: Any) -> Any:
    return aten.add.Tensor(aten.linear.default(x, w), b)


def rewrite_linear(x: Any, w: Any, b: Any) -> Any:
    return aten.linear.default(x, w, b)


@dataclass(frozen=True)
class LinearBias(Rule):
    """x Wt + b, the bias a weight of one axis."""

    pattern: ClassVar[Any] = staticmethod(pattern_linear)
    rewrite: ClassVar[Any] = staticmethod(rewrite_linear)

    def check(self, x: Any, w: Any, b: Any) -> str | None:
        if rank(b) != 1 or not _is_held(b) or b.meta["val"].shape[0] != w.meta["val"].shape[0]:
            return "what is added is no bias of the layer"
        return None


def pattern_linear_by_permute(x: Any, w: Any, axes: Any) -> Any:
    return aten.matmul.default(x, aten.permute.default(w, axes))


def rewrite_linear_by_permute(x: Any, w: Any, axes: Any) -> Any:
    return aten.linear.default(x, w)


@dataclass(frozen=True)
class LinearByPermute(Rule):
    """x Wt, as `x @ weight.T` writes it."""

    pattern: ClassVar[Any] = staticmethod(pattern_linear_by_permute)
    rewrite: ClassVar[Any] = staticmethod(rewrite_linear_by_permute)

    def check(self, x: Any, w: Any, axes: Any) -> str | None:
        return _no_weight(w) or (None if [axis % 2 for axis in axes] == [1, 0] else "the weight is not transposed")


def pattern_linear_by_transpose(x: Any, w: Any) -> Any:
    return aten.matmul.default(x, aten.t.default(w))


def rewrite_linear_by_transpose(x: Any, w: Any) -> Any:
    return aten.linear.default(x, w)


@dataclass(frozen=True)
class LinearByTranspose(Rule):
    """The same, as `x @ weight.t()`."""

    pattern: ClassVar[Any] = staticmethod(pattern_linear_by_transpose)
    rewrite: ClassVar[Any] = staticmethod(rewrite_linear_by_transpose)

    def check(self, x: Any, w: Any) -> str | None:
        return _no_weight(w)


def _no_weight(w: Any) -> str | None:
    held = w.op == "get_attr" and rank(w) == 2 and w.meta["val"].dtype.is_floating_point
    return None if held else "the second factor is no transposed weight"


def pattern_flat_linear(x: Any, w: Any, b: Any, flat: Any, shape: Any) -> Any:
    return aten.view.default(aten.linear.default(aten.view.default(x, flat), w, b), shape)


def rewrite_flat_linear(x: Any, w: Any, b: Any, flat: Any, shape: Any) -> Any:
    return aten.linear.default(x, w, b) if b is not None else aten.linear.default(x, w)


@dataclass(frozen=True)
class FlatLinear(Rule):
    """A linear layer over rows that are put together before and taken apart after it."""

    pattern: ClassVar[Any] = staticmethod(pattern_flat_linear)
    rewrite: ClassVar[Any] = staticmethod(rewrite_flat_linear)

    def check(self, x: Any, w: Any, b: Any, flat: Any, shape: Any) -> str | None:
        rows, width = shape_key(x.meta["val"])[:-1], w.meta["val"].shape
        if shape_key(x.meta["val"])[-1] != width[1]:
            return "the rows are not those of the layer"
        wanted = (*rows, width[0])
        (view,) = (user for user in _linear_of(x, w).users)
        return None if shape_key(view.meta["val"]) == wanted else "the rows are taken apart in another way"


def _linear_of(x: Node, w: Node) -> Node:
    """The linear layer over a view of `x`; the match has made sure that there is one with one user."""
    return next(
        user
        for view in x.users
        if view.target is aten.view.default
        for user in view.users
        if user.target is aten.linear.default and user.args[1] is w and len(user.users) == 1
    )


def pattern_gelu(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.mul.Tensor(aten.mul.Tensor(x, aten.add.Tensor(aten.erf.default(aten.div.Tensor(x, root)), one)), half)


def pattern_gelu_halved(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.mul.Tensor(aten.mul.Tensor(x, half), aten.add.Tensor(aten.erf.default(aten.div.Tensor(x, root)), one))


def rewrite_gelu(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.gelu.default(x)


@dataclass(frozen=True)
class Gelu(Rule):
    """x (1 + erf(x / sqrt 2)) / 2."""

    pattern: ClassVar[Any] = staticmethod(pattern_gelu)
    rewrite: ClassVar[Any] = staticmethod(rewrite_gelu)

    def check(self, x: Any, root: Any, one: Any, half: Any) -> str | None:
        exact = near(root, math.sqrt(2)) and near(one, 1) and near(half, 0.5)
        return None if exact else "the numbers are not those of GELU"


@dataclass(frozen=True)
class HalvedGelu(Gelu):
    """x / 2 (1 + erf(x / sqrt 2))."""

    pattern: ClassVar[Any] = staticmethod(pattern_gelu_halved)


def pattern_tanh_gelu(x: Any, half: Any, three: Any, cubic: Any, root: Any, one: Any) -> Any:
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, three), cubic))
    return aten.mul.Tensor(
        aten.mul.Tensor(x, half), aten.add.Tensor(aten.tanh.default(aten.mul.Tensor(inner, root)), one)
    )


def rewrite_tanh_gelu(x: Any, half: Any, three: Any, cubic: Any, root: Any, one: Any) -> Any:
    return aten.gelu.default(x, approximate="tanh")


@dataclass(frozen=True)
class TanhGelu(Rule):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

    pattern: ClassVar[Any] = staticmethod(pattern_tanh_gelu)
    rewrite: ClassVar[Any] = staticmethod(rewrite_tanh_gelu)

    def check(self, x: Any, half: Any, three: Any, cubic: Any, root: Any, one: Any) -> str | None:
        numbers = near(half, 0.5) and near(three, 3) and near(cubic, 0.044715) and near(one, 1)
        return None if numbers and near(root, math.sqrt(2 / math.pi)) else "the numbers are not those of GELU"


def pattern_tanh_gelu_by_products(x: Any, half: Any, cubic: Any, root: Any, one: Any) -> Any:
    cube = aten.mul.Tensor(x, aten.mul.Tensor(x, x))
    inner = aten.add.Tensor(x, aten.mul.Tensor(cube, cubic))
    return aten.mul.Tensor(
        aten.mul.Tensor(x, aten.add.Tensor(aten.tanh.default(aten.mul.Tensor(inner, root)), one)), half
    )


def rewrite_tanh_gelu_by_products(x: Any, half: Any, cubic: Any, root: Any, one: Any) -> Any:
    return aten.gelu.default(x, approximate="tanh")


@dataclass(frozen=True)
class TanhGeluByProducts(Rule):
    """The same as TorchScript's exporter writes it, the cube as products and the half last."""

    pattern: ClassVar[Any] = staticmethod(pattern_tanh_gelu_by_products)
    rewrite: ClassVar[Any] = staticmethod(rewrite_tanh_gelu_by_products)

    def check(self, x: Any, half: Any, cubic: Any, root: Any, one: Any) -> str | None:
        numbers = near(half, 0.5) and near(cubic, 0.044715) and near(one, 1)
        return None if numbers and near(root, math.sqrt(2 / math.pi)) else "the numbers are not those of GELU"


def pattern_silu(x: Any) -> Any:
    return aten.mul.Tensor(x, aten.sigmoid.default(x))


def rewrite_silu(x: Any) -> Any:
    return aten.silu.default(x)


@dataclass(frozen=True)
class Silu(Rule):
    """x sigmoid(x)."""

    pattern: ClassVar[Any] = staticmethod(pattern_silu)
    rewrite: ClassVar[Any] = staticmethod(rewrite_silu)


def pattern_hard_swish(x: Any) -> Any:
    return aten.mul.Tensor(x, aten.hardsigmoid.default(x))


def rewrite_hard_swish(x: Any) -> Any:
    return aten.hardswish.default(x)


@dataclass(frozen=True)
class HardSwish(Rule):
    """x hardsigmoid(x), as exporters write it for opsets before 14."""

    pattern: ClassVar[Any] = staticmethod(pattern_hard_swish)
    rewrite: ClassVar[Any] = staticmethod(rewrite_hard_swish)


def pattern_rms_norm(x: Any, w: Any, two: Any, axes: Any, epsilon: Any) -> Any:
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, two), axes, True)
    root = aten.sqrt.default(aten.add.Tensor(mean, epsilon))
    return aten.mul.Tensor(w, aten.mul.Tensor(x, aten.reciprocal.default(root)))


def pattern_rms_norm_rsqrt(x: Any, w: Any, two: Any, axes: Any, epsilon: Any) -> Any:
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, two), axes, True)
    return aten.mul.Tensor(w, aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, epsilon))))


def rewrite_rms_norm(x: Any, w: Any, two: Any, axes: Any, epsilon: Any) -> Any:
    return aten.rms_norm.default(x, [w.node.meta["val"].shape[0]], w, epsilon)


@dataclass(frozen=True)
class RmsNorm(Rule):
    """w x / sqrt(mean(x^2) + epsilon) over the last axis."""

    pattern: ClassVar[Any] = staticmethod(pattern_rms_norm)
    rewrite: ClassVar[Any] = staticmethod(rewrite_rms_norm)

    def check(self, x: Any, w: Any, two: Any, axes: Any, epsilon: Any) -> str | None:
        last = rank(x) - 1
        if not near(two, 2) or list(axes) not in ([last], [-1]) or not isinstance(epsilon, float):
            return "it is no mean of squares over the last axis"
        if rank(w) != 1 or shape_key(w.meta["val"])[0] != shape_key(x.meta["val"])[-1]:
            return "the weight is not one of the last axis"
        if not isinstance(shape_key(w.meta["val"])[0], int):
            return "the length of the last axis is dynamic"
        return None


@dataclass(frozen=True)
class RsqrtRmsNorm(RmsNorm):
    """The same, by the reciprocal of the root in one operator."""

    pattern: ClassVar[Any] = staticmethod(pattern_rms_norm_rsqrt)


@dataclass(frozen=True)
class RaiseComposites(RewritePass):
    """Bias and rows of linear layers first, as the others do not depend on them."""

    name: ClassVar[str] = "raising"
    rules: ClassVar[tuple[type[Rule], ...]] = (
        *(LinearByPermute, LinearByTranspose, LinearBias, FlatLinear),
        *(Gelu, HalvedGelu, TanhGelu, TanhGeluByProducts, Silu, HardSwish),
        *(RmsNorm, RsqrtRmsNorm),
    )
