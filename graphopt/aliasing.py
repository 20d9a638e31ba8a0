"""Which nodes are views of which memory: functional graphs still return views, and outputs must stay their own."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType

from torch._ops import OpOverload
from torch.fx import Node

UNANNOTATED_VIEWS = frozenset({"aten::_unsafe_view", "aten::reshape", "aten::contiguous", "aten::dropout"})


def is_view(node: Node) -> bool:
    """Whether the result may be the same memory as the first argument."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema
    if schema.name in UNANNOTATED_VIEWS:
        return True
    first = schema.arguments[0] if schema.arguments else None
    return first is not None and first.alias_info is not None and not first.alias_info.is_write


def memory_root(node: Node, known: Mapping[Node, Node] = MappingProxyType({})) -> Node:
    """The node that made the memory `node` may be a view of; `known` holds those found before."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
        if node in known:
            return known[node]
    return node


def output_reached(node: Node) -> Node | None:
    """The first output that may be a view of `node`'s memory, or None."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.op == "output":
                return current
            if user not in seen and is_view(user) and user.args[0] is current:
                seen.add(user)
                pending.append(user)
    return None


def why_output_needs_copy(copy: Node, source: Node) -> str | None:
    """Why `source` cannot stand for its copy: an output would share memory with an input, a weight or an output."""
    reached = output_reached(copy)
    if reached is None:
        return None
    root = memory_root(source)
    if root.op == "placeholder":
        return f"the output {reached.name} would be the memory of the input {root.name}"
    if root.op == "get_attr":
        return f"the output {reached.name} would be the memory of the weight {root.target}"
    other = output_reached(root)
    if other is not None:
        return f"the outputs {reached.name} and {other.name} would be the same memory"
    return None
