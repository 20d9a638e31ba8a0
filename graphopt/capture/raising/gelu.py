"""GELU with products where PyTorch has quotients, as TensorFlow's files have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.capture.raising.composites import Gelu, near
from graphopt.rewrite import RewritePass, Rule

aten = torch.ops.aten


def pattern_halved(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.mul.Tensor(aten.mul.Tensor(x, half), aten.add.Tensor(aten.erf.default(aten.mul.Tensor(x, root)), one))


def pattern_distribution(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.mul.Tensor(x, aten.mul.Tensor(aten.add.Tensor(aten.erf.default(aten.mul.Tensor(x, root)), one), half))


def pattern_distribution_of_quotient(x: Any, root: Any, one: Any, half: Any) -> Any:
    return aten.mul.Tensor(x, aten.mul.Tensor(aten.add.Tensor(aten.erf.default(aten.div.Tensor(x, root)), one), half))


@dataclass(frozen=True)
class GeluByProduct(Gelu):
    """x / 2 (1 + erf(x sqrt(1 / 2)))."""

    pattern: ClassVar[Any] = staticmethod(pattern_halved)

    def check(self, x: Any, root: Any, one: Any, half: Any) -> str | None:
        exact = near(root, math.sqrt(0.5)) and near(one, 1) and near(half, 0.5)
        return None if exact else "the numbers are not those of GELU"


@dataclass(frozen=True)
class GeluByDistribution(GeluByProduct):
    """x times the normal distribution, (1 + erf(x sqrt(1 / 2))) / 2."""

    pattern: ClassVar[Any] = staticmethod(pattern_distribution)


@dataclass(frozen=True)
class GeluByDistributionOfQuotient(Gelu):
    """The same by x / sqrt 2."""

    pattern: ClassVar[Any] = staticmethod(pattern_distribution_of_quotient)


@dataclass(frozen=True)
class RaiseGelu(RewritePass):
    """GELU in one node."""

    name: ClassVar[str] = "raising"
    rules: ClassVar[tuple[type[Rule], ...]] = (GeluByProduct, GeluByDistribution, GeluByDistributionOfQuotient)
