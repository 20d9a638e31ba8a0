"""What an ONNX name stands for while its graph is read: numbers known now, or a tensor computed at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.fx import Node

from graphopt.capture.onnx.narrow import Narrow

KNOWN_ELEMENTS = 64  # a larger array is a tensor
MOST_KNOWN = 1024  # of what is computed from known arrays: doubled a few times, an array takes all memory
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Known:
    """A small array of Python numbers and symbolic sizes: shape arithmetic on it leaves no node in the graph."""

    array: np.ndarray[Any, np.dtype[np.object_]]
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def symbolic(self) -> bool:
        return any(isinstance(value, SYMBOLIC) for value in self.array.flat)

    def items(self) -> list[Any]:
        """All elements, the last axis fastest."""
        return list(self.array.flat)

    def tensor(self) -> torch.Tensor:
        """Only where nothing is symbolic."""
        return torch.tensor(self.array.tolist(), dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A node of the graph and its fake tensor; `narrow`: the type in the file where torch has none of its bits."""

    node: Node
    fake: torch.Tensor
    narrow: Narrow | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.fake.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype

    @property
    def ndim(self) -> int:
        return self.fake.ndim


@dataclass(frozen=True, eq=False)
class Items:
    """A sequence of tensors: only operators on sequences read it."""

    values: tuple[Known | Tensor, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values),)


Present: TypeAlias = Known | Tensor
Value: TypeAlias = Known | Tensor | None  # None: an optional input left out


def known(items: Any, dtype: torch.dtype = torch.int64, shape: tuple[int, ...] | None = None) -> Known:
    """A Known of a number or a flat list, by default one axis long; floats take the value their type can hold."""
    values = items if isinstance(items, list) else [items]
    array = np.empty(len(values), dtype=object)
    array[:] = [rounded(value, dtype) for value in values]
    default = (len(values),) if isinstance(items, list) else ()
    return Known(array.reshape(default if shape is None else shape), dtype)


def known_tensor(tensor: torch.Tensor) -> Known:
    return known(tensor.reshape(-1).tolist(), tensor.dtype, tuple(tensor.shape))


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """A float that its type holds; of float32 by the shortest decimal: 1e-12, not 9.999999960041972e-13."""
    if dtype in (torch.float16, torch.bfloat16) and isinstance(value, float):
        return torch.tensor(value, dtype=dtype).item()
    if dtype == torch.float32 and isinstance(value, float):
        with np.errstate(over="ignore"):
            exact = np.float32(value)
        shortest = float(str(exact))
        # The shortest decimal of the largest number lies above it.
        return float(exact) if abs(shortest) > float(np.finfo(np.float32).max) and np.isfinite(exact) else shortest
    return value


def exact(value: Any, dtype: torch.dtype) -> Any:
    """The number that the decimal of a Known stands for."""
    return float(np.float32(value)) if dtype == torch.float32 and isinstance(value, float) else value


def stays_known(value: Known) -> bool:
    """Whether it is small and each number one of its type; others are left to tensors, where they wrap around."""
    if value.array.size > MOST_KNOWN:
        return False
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        return True
    bounds = torch.iinfo(value.dtype)
    return all(bounds.min <= _hint(item) <= bounds.max for item in value.array.flat)


def _hint(item: Any) -> Any:
    """A number, or that of a symbolic size at the sizes which the graph is read with."""
    if not isinstance(item, torch.SymInt):
        return 0 if isinstance(item, SYMBOLIC) else item
    return 0 if item.node.hint is None else item.node.hint


def narrow_of(value: Value) -> Narrow | None:
    """The type in the file where torch has none of its bits."""
    return value.narrow if isinstance(value, Tensor) else None
