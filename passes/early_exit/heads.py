"""Heads at the exits: the network's own, read at an earlier value, with a last product of their own.

A head that has no product, as of an embedder, gets one behind its pooled value, which begins as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.early_exit.places import INPUTS, WEIGHTS, Head

aten = torch.ops.aten

BIASES: Mapping[Any, str] = {aten.linear.default: "bias", aten.addmm.default: "self"}


@dataclass(frozen=True)
class Product:
    """The weight and bias (None: there is none) of one head's own product."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def tensors(self) -> tuple[torch.nn.Parameter, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Copied:
    """One head in the graph: its outputs in the order of the program's, and what its own product reads.

    `weights` are the attributes with the values of `Product.tensors`.
    """

    outputs: tuple[Node, ...]
    feature: Node
    weights: tuple[str, ...]


def final_product(editor: GraphEditor, head: Head) -> Product:
    """A copy of the network's own last product, or the identity: what every head begins as."""
    if head.product is None:
        assert head.pooled is not None
        value = head.pooled.meta["val"]
        width, dtype = int(value.shape[-1]), value.dtype
        return Product(
            torch.nn.Parameter(torch.eye(width, dtype=dtype)), torch.nn.Parameter(torch.zeros(width, dtype=dtype))
        )
    weight = editor.constant_value(argument(head.product, WEIGHTS[head.product.target]))
    bias = None
    if head.product.target in BIASES:
        bias = editor.constant_value(argument(head.product, BIASES[head.product.target]))
    assert weight is not None
    return Product(_copied(weight), None if bias is None else _copied(bias))


def _copied(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach().clone())


def copy_head(builder: Builder, head: Head, results: Sequence[Node], place: Node, product: Product) -> Copied:
    """The head once more behind `place`, sharing all weights but those of its last product."""
    values: dict[Node, Node] = {head.source: place}
    feature, own = place, dict[Any, Node]()
    for node in head.nodes:
        if node is head.product:
            feature = values[argument(node, INPUTS[node.target])]
            read = [argument(node, WEIGHTS[node.target])]
            if product.bias is not None:
                read.append(argument(node, BIASES[node.target]))
            own = dict(zip(read, map(builder.constant, product.tensors()), strict=True))
            values[node] = builder.repeat(node, {**values, **own})
        else:
            values[node] = builder.repeat(node, values)
        if node is head.pooled and head.product is None:
            feature = values[node]
            own = dict(enumerate(map(builder.constant, product.tensors())))
            values[node] = builder.call(aten.linear.default, feature, *own.values())
    weights = tuple(str(node.target) for node in own.values())
    return Copied(tuple(values[result] for result in results), feature, weights)
