"""Weights by the memory they lie in: a tied weight and its views are one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graphopt.program import Program, full_name, get_attribute


@dataclass(frozen=True)
class Stored:
    """One storage: the names of the attributes that lie in it, its elements and its bytes.

    A storage counts whole, even when all of its attributes together are views of a part. The name of an attribute in a
    sub-graph starts with the path of this graph.
    """

    names: tuple[str, ...]
    elements: int
    bytes: int


def stored_weights(program: Program) -> tuple[Stored, ...]:
    """Every storage that some node of some graph reads, by first use; tensors without elements are left out."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for path, module in program.graphs():
        for node in module.graph.find_nodes(op="get_attr"):
            value = get_attribute(module, str(node.target))
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                place = value.untyped_storage().data_ptr()
                tensors.setdefault(place, value)
                names.setdefault(place, []).append(full_name(path, str(node.target)))
    return tuple(_stored(names[place], tensor) for place, tensor in tensors.items())


def _stored(names: Iterable[str], tensor: torch.Tensor) -> Stored:
    size = tensor.untyped_storage().nbytes()
    return Stored(tuple(dict.fromkeys(names)), size // tensor.element_size(), size)
