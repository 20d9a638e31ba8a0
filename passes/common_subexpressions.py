"""Compute a value once where it is computed several times from the same arguments.

Before: a = relu(x); b = relu(x); return a + b        After: a = relu(x); return a + a

Arguments left out and arguments that repeat the default are the same, and so are the two orders of a commutative
operator. Random operators are never merged, control flow is left alone, and two outputs keep memory of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import Node

from graphopt.aliasing import memory_root, output_reached
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Edit, GraphEditor
from graphopt.effects import has_effect
from graphopt.matcher import arguments, commutes
from graphopt.program import Program


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Compute a value once where it is computed several times from the same arguments."""

    name = "common-subexpressions"
    measured = False
    unrecorded = "no earlier node computes the same value, or it is random or control flow"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            self._merge(editor)
        return edit.finish()

    def _merge(self, editor: GraphEditor) -> None:
        first: dict[Hashable, Node] = {}
        roots: dict[Node, Node] = {}
        for node in editor.nodes():
            roots[node] = memory_root(node, roots)
            key = expression_key(node)
            if key is None:
                continue
            earlier = first.setdefault(key, node)
            if earlier is node:
                continue
            reason = why_apart(node, earlier, roots)
            if reason is not None:
                editor.decline(self.name, node, reason)
            else:
                editor.replace(self.name, [node], lambda builder, earlier=earlier: [earlier])  # type: ignore[misc]


def expression_key(node: Node) -> Hashable | None:
    """Equal for two nodes that compute the same value; None for nodes that must not be merged."""
    if node.op == "get_attr":
        return ("get_attr", str(node.target)) if "val" in node.meta else None
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator) or has_effect(node):
        return None
    keys = [_literal_key(argument) for argument in arguments(node)]
    if commutes(node):
        keys[:2] = sorted(keys[:2], key=repr)
    return node.target, tuple(keys)


def why_apart(node: Node, earlier: Node, roots: Mapping[Node, Node]) -> str | None:
    """Why two equal values are both needed: each is the memory of an output."""
    if node.op != "call_function" or roots[node] is roots[earlier]:
        return None
    mine = output_reached(roots[node])  # few use this one: it is asked first, since all duplicates share the earlier
    other = None if mine is None else output_reached(roots[earlier])
    if mine is not None and other is not None:
        return f"the outputs {mine.name} and {other.name} would be the same memory"
    return None


def _literal_key(value: Any) -> Hashable:
    if isinstance(value, Node):
        return "node", value.name
    if isinstance(value, (list, tuple)):
        return tuple(_literal_key(item) for item in value)
    return type(value).__name__, repr(value)
