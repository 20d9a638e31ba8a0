"""The tensors of the model as attributes of a module, under names that Python and torch can use."""

from __future__ import annotations

import re

import torch
from torch.fx import Graph, GraphModule

from graphopt.program import get_attribute, has_attribute, set_attribute

_RESERVED = frozenset(dir(GraphModule(torch.nn.Module(), Graph())))


class Weights:
    """Initializers by their dotted ONNX names: floating tensors are parameters, all others buffers."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self._constants: dict[tuple[object, ...], str] = {}

    def add(self, name: str, tensor: torch.Tensor, *, trainable: bool) -> str:
        """Hold a tensor; returns the attribute's name, which is `name` where that is possible."""
        target = self._free(name)
        set_attribute(self.root, target, torch.nn.Parameter(tensor, requires_grad=False) if trainable else tensor)
        return target

    def constant(self, tensor: torch.Tensor) -> str:
        """Hold a small constant, each once."""
        key = (tensor.dtype, tuple(tensor.shape), str(tensor.tolist()))
        if key not in self._constants:
            self._constants[key] = self.add(f"constant_{len(self._constants)}", tensor, trainable=False)
        return self._constants[key]

    def _free(self, name: str) -> str:
        *containers, last = [re.sub(r"\W", "_", part, flags=re.ASCII) or "_" for part in name.split(".")]
        path = ""
        for part in containers:
            while part in _RESERVED or self._is_tensor(path + part):
                part += "_"
            path += f"{part}."
        while last in _RESERVED or has_attribute(self.root, path + last):
            last += "_"
        return path + last

    def _is_tensor(self, target: str) -> bool:
        return has_attribute(self.root, target) and isinstance(get_attribute(self.root, target), torch.Tensor)
