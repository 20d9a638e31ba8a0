"""Weights as kernels read them: each tensor packed once for every layout that some kernel wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import torch

from graphopt.arrays import array_of


@dataclass
class Weights:
    """Packed tensors of all entries by name; a tensor packed the same way twice exists once."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)  # an address is a tensor's own only as long as it lives

    def add(self, tensor: torch.Tensor, label: str, key: str, pack: Callable[[np.ndarray], np.ndarray] | None) -> str:
        """The name under which the packed tensor is kept; `label` and `key` make it readable."""
        identity = (*_identity(tensor), key)
        if identity not in self.names:
            array = array_of(tensor)
            array = np.asarray(array if pack is None else pack(array), order="C")  # rank 0 stays rank 0
            base = f"{label}.{key}" if key else label
            others = (f"{base}_{number}" for number in count(len(self.arrays)))
            name = next(name for name in chain((base,), others) if name not in self.arrays)
            self.arrays[name] = array
            self.names[identity] = name
            self.held.append(tensor)
        return self.names[identity]

    def packings(self, tensor: torch.Tensor) -> list[str]:
        """The keys under which `add` keeps the tensor."""
        place = _identity(tensor)
        return [key for *other, key in self.names if tuple(other) == place]

    def forget(self, name: str) -> None:
        """Take back what `add` kept last."""
        del self.arrays[name]
        self.names = {identity: other for identity, other in self.names.items() if other != name}


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype)
