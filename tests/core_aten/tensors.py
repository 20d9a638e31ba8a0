"""Inputs for samples of ATen overloads: one dtype, one number of rows, equal requests are one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0, 0.5, -2.5)


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


@dataclass
class Tensors:
    """Makes inputs of `dtype`; axes of `rows` elements become symbolic where a sample is compiled dynamically."""

    dtype: torch.dtype
    rows: int = 3
    _made: dict[Any, Tensor] = field(default_factory=dict)

    def x(self, *shape: int, number: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Both signs; floats hold NaN, infinities and both zeros first, in an order of their own for each number."""

        def make(generator: torch.Generator, kind: torch.dtype) -> Tensor:
            tensor = _spread(shape, kind, generator)
            if kind.is_floating_point and tensor.numel() > len(SPECIAL):
                specials = torch.tensor(SPECIAL).roll(2 * number).to(kind)
                tensor.view(-1)[: len(SPECIAL)] = specials
            return tensor

        return self._once("x", shape, number, dtype, make)

    def finite(self, *shape: int, number: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Both signs, without special values."""
        return self._once("finite", shape, number, dtype, lambda g, kind: _spread(shape, kind, g))

    def divisor(self, *shape: int, number: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """As `x` for floats; whole numbers of both signs without 0, by which PyTorch refuses to divide."""

        def make(generator: torch.Generator, kind: torch.dtype) -> Tensor:
            tensor = _spread(shape, kind, generator)
            return torch.where(tensor == 0, torch.ones_like(tensor), tensor)

        kind = dtype or self.dtype
        if kind.is_floating_point:
            return self.x(*shape, number=number, dtype=kind)
        return self._once("divisor", shape, number, dtype, make)

    def small(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Whole numbers from 0 to 3."""
        return self._once("small", shape, 0, dtype, lambda g, kind: torch.randint(0, 4, shape, generator=g).to(kind))

    def distinct(self, *shape: int) -> Tensor:
        """No value twice, as far as the dtype has so many; one NaN in floats."""

        def make(generator: torch.Generator, kind: torch.dtype) -> Tensor:
            count = math.prod(shape)
            tensor = (torch.randperm(count, generator=generator) - (0 if kind is torch.uint8 else count // 2)).to(kind)
            if kind.is_floating_point and count > 4:
                tensor[3] = math.nan
            return tensor.reshape(shape)

        return self._once("distinct", shape, 0, None, make)

    def index(self, size: int, *shape: int, number: int = 0, low: int = 0) -> Tensor:
        """Positions from `low` to size - 1."""

        def make(generator: torch.Generator, kind: torch.dtype) -> Tensor:
            return torch.randint(low, size, shape, generator=generator)

        return self._once(f"index{size}{low}", shape, number, torch.int64, make)

    def permutation(self, size: int) -> Tensor:
        """Every position once."""
        return self._once("permutation", (size,), 0, torch.int64, lambda g, _: torch.randperm(size, generator=g))

    def flags(self, *shape: int, number: int = 0) -> Tensor:
        return self._once("flags", shape, number, torch.bool, lambda g, _: torch.rand(shape, generator=g) < 0.5)

    def _once(
        self,
        name: str,
        shape: tuple[int, ...],
        number: int,
        dtype: torch.dtype | None,
        make: Callable[[torch.Generator, torch.dtype], Tensor],
    ) -> Tensor:
        kind = dtype or self.dtype
        key = (name, shape, number, kind)
        if key not in self._made:
            generator = torch.Generator().manual_seed(17 + number + sum(shape))
            self._made[key] = make(generator, kind)
        return self._made[key]


def _spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0 if dtype is torch.uint8 else -6, 7, shape, generator=generator).to(dtype)


Samples = Callable[[Tensors], list[Call]]
