"""The canonical form of a region: equal for two regions exactly when they compute the same of their inputs.

It holds operators, literals with defaults filled in, types and sizes of values, and which value is read where; it holds
no names and no weights. Nodes are numbered from the region's end along the arguments, so the order of execution of
independent nodes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt.analysis.view import Kind
from graphopt.matcher import arguments
from graphopt.program import get_attribute
from graphopt.propagate import shape_key, size_key

Place = Callable[[Node], Hashable]  # what stands for an argument


@dataclass(frozen=True)
class Form:
    """Two regions with equal `key` correspond: node by node, and leaf by leaf (what is read from outside)."""

    key: Hashable
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]


def canonical_form(kinds: Mapping[Node, Kind], start: Node, region: Set[Node], end: Node) -> Form:
    """The form of `region`, all of whose nodes `end` depends on; `start` is the value that is its main input."""
    number: dict[Node, int] = {start: 0}
    nodes: list[Node] = []
    leaves: list[Node] = []

    def place(node: Node) -> Hashable:
        if node not in number:
            number[node] = len(number) + 1
            leaves.append(node)
            return leaf_key(kinds, node)
        return number[node]

    key: list[Hashable] = [type_key(start.meta.get("val"))]
    pending = [end]
    while pending:
        node = pending[-1]
        missing = [item for item in node.all_input_nodes if item in region and item not in number]
        if node in number or not missing:
            pending.pop()
        if node not in number and not missing:
            key.append(call_key(kinds, node, place))
            number[node] = len(number) + 1
            nodes.append(node)
        pending.extend(reversed(missing))
    return Form(tuple(key), tuple(nodes), tuple(leaves))


def call_key(kinds: Mapping[Node, Kind], node: Node, place: Place) -> Hashable:
    """What the node computes; `place` says what stands for arguments other than sizes and sub-graphs."""

    def freeze(value: Any) -> Hashable:
        if isinstance(value, Node):
            if kinds[value] == "size":
                return "size", size_key(value.meta.get("val"))
            return graph_key(value) if kinds[value] == "module" else place(value)
        return literal_key(value, freeze)

    return node.op, node.target, freeze(arguments(node)), type_key(node.meta.get("val"))


def literal_key(value: Any, freeze: Callable[[Any], Hashable]) -> Hashable:
    """Equal only for equal literals of one type: 1, 1.0 and True differ; lists and tuples do not."""
    if isinstance(value, (list, tuple)):
        return "list", tuple(map(freeze, value))
    if isinstance(value, dict):
        return "dict", tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", freeze(value.start), freeze(value.stop), freeze(value.step)
    return type(value), repr(value) if isinstance(value, float) else value


def leaf_key(kinds: Mapping[Node, Kind], leaf: Node) -> Hashable:
    """What is known of a value from outside: a weight or another one, its type and its sizes."""
    return kinds[leaf] == "weight", type_key(leaf.meta.get("val"))


def type_key(value: Any) -> Hashable:
    """Type and sizes of a value; where a tensor lies in memory is left out."""
    if isinstance(value, torch.Tensor):
        return value.dtype, shape_key(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(type_key, value))
    key: Hashable = size_key(value)
    return key


def graph_key(attribute: Node) -> Hashable:
    """The form of the sub-graph that an attribute node names: all of its nodes in order."""
    owner = attribute.graph.owning_module
    module = get_attribute(owner, str(attribute.target)) if owner is not None else None
    return _module_key(module) if isinstance(module, GraphModule) else attribute.target


def _module_key(module: GraphModule) -> Hashable:
    number: dict[Node, int] = {}
    kinds: dict[Node, Kind] = {}
    keys: list[Hashable] = []
    for node in module.graph.nodes:
        sub_graph = node.op == "get_attr" and isinstance(get_attribute(module, str(node.target)), GraphModule)
        kinds[node] = "module" if sub_graph else "data"
        number[node] = len(number)
        if node.op in ("placeholder", "get_attr"):
            keys.append((node.op, graph_key(node) if sub_graph else type_key(node.meta.get("val"))))
        else:
            keys.append(call_key(kinds, node, number.__getitem__))
    return tuple(keys)


def same_order(forms: Iterable[Form]) -> list[tuple[Node, ...]]:
    """Corresponding nodes, then corresponding leaves, of forms with equal keys: one row each, one entry a form."""
    return list(zip(*((*form.nodes, *form.leaves) for form in forms), strict=True))
