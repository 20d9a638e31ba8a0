"""Compute once, now, what is computed from weights alone; write known sizes as numbers.

Before: w2 = mul(w, 2.0); y = linear(x, w2)        After: y = linear(x, constant_folding_0)

Only the last value of a constant chain is stored. Memory may grow by at most `max_bytes` over the whole program
(a result counts less the weights that nothing else reads); what would grow it further stays and says so. Random
operators, control flow and anything with a symbolic size stay. A factory alone, such as zeros([2, 3]), stays too:
storing it saves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Edit, GraphEditor, is_control_flow
from graphopt.program import Program
from graphopt.propagate import shape_key, size_key

FOLDED = ("aten", "prims")  # quantized weights are stored small on purpose: what widens them is kept
KEPT_TAGS = frozenset({torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output})


@dataclass(frozen=True)
class ConstantFolding(Pass):
    """Compute once, now, what is computed from weights alone; write known sizes as numbers."""

    name = "constant-folding"
    measured = False
    unrecorded = "its value depends on an input, or storing it would save nothing"
    max_bytes: int = 1 << 24

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        left = self.max_bytes
        for editor in edit.graphs():
            fold_sizes(editor, f"{self.name}/size")
            left = self._fold(editor, left)
        return edit.finish()

    def _fold(self, editor: GraphEditor, left: int) -> int:
        constants = find_constants(editor, self.name, self.max_bytes)
        values = _Values(editor, constants)
        for node in editor.nodes():
            if node not in constants or not _is_worth_storing(node, constants):
                continue
            grows = _bytes(node) - _bytes_freed(node, constants)
            if grows > left:
                editor.decline(self.name, node, f"memory would grow by {grows} bytes; {left} of max-bytes are left")
                continue
            result = values.of(node).clone(memory_format=torch.contiguous_format)
            if editor.replace(self.name, [node], lambda builder, result=result: [builder.constant(result)]):  # type: ignore[misc]
                left -= max(grows, 0)
                values.forget(node)
        return left


def find_constants(editor: GraphEditor, rule: str, max_bytes: int) -> set[Node]:
    """Nodes that depend on weights and literals only, with no step larger than `max_bytes` or what it reads."""
    found: set[Node] = set()
    for node in editor.graph.nodes:
        if node.op == "get_attr":
            if editor.constant_value(node) is not None:
                found.add(node)
        elif node.op == "call_function" and all(argument in found for argument in node.all_input_nodes):
            reason = why_kept(node, max_bytes)
            if reason is None:
                found.add(node)
            elif node.all_input_nodes:
                editor.decline(rule, node, reason)
    return found


def fold_sizes(editor: GraphEditor, rule: str) -> None:
    """Write size nodes whose value is a known integer as that integer."""
    for node in editor.nodes():
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            continue
        number = size_key(value)
        if isinstance(number, int) and not any(is_control_flow(user) or user.op == "output" for user in node.users):
            editor.replace(rule, [node], lambda builder, number=number: [number])  # type: ignore[misc]


def why_kept(node: Node, max_bytes: int) -> str | None:
    """Why a call with constant arguments is not computed now."""
    if node.is_impure() or is_control_flow(node):
        return f"{node.target} has an effect or runs sub-graphs"
    if isinstance(node.target, OpOverload):
        if node.target.namespace not in FOLDED:
            return f"{node.target} reads weights that are stored small on purpose"
        if KEPT_TAGS.intersection(node.target.tags):
            return f"{node.target} is random, or its shape depends on values"
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(leaf, torch.Tensor) and _is_static(leaf) for leaf in leaves):
        return "its value is no tensor of a known size"
    if _bytes(node) > max(max_bytes, sum(map(_bytes, node.all_input_nodes))):
        return f"its {_bytes(node)} bytes exceed max-bytes={max_bytes}"
    return None


def _is_static(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in shape_key(tensor))


def _is_worth_storing(node: Node, constants: set[Node]) -> bool:
    """The end of a constant chain that reads a weight or does more than one step."""
    if node.op == "get_attr" or not isinstance(node.meta["val"], torch.Tensor) or not node.all_input_nodes:
        return False
    return not _only_grows(node) and any(_is_read(user, constants) for user in node.users)


def _is_read(user: Node, constants: set[Node]) -> bool:
    """Whether `user` stays: an expand at the end of a chain does, and its source is stored instead."""
    return user not in constants or (_only_grows(user) and any(reader not in constants for reader in user.users))


def _only_grows(node: Node) -> bool:
    return node.target is torch.ops.aten.expand.default and _bytes(node) > sum(map(_bytes, node.all_input_nodes))


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    return sum(math.prod(map(int, leaf.shape)) * leaf.element_size() for leaf in leaves if _is_static(leaf))


def _bytes_freed(node: Node, constants: set[Node]) -> int:
    """Bytes of weights that only the chain ending in `node` reads."""
    freed, pending, seen = 0, [node], {node}
    while pending:
        for argument in pending.pop().all_input_nodes:
            if argument in seen or any(user not in seen for user in argument.users):
                continue
            seen.add(argument)
            pending.append(argument)
            freed += _bytes(argument) if argument.op == "get_attr" else 0
    return freed


class _Values:
    """Real values of constant nodes, each computed once and kept until the last constant that reads it is there."""

    def __init__(self, editor: GraphEditor, constants: set[Node]) -> None:
        self._editor = editor
        self._constants = constants
        self._kept: dict[Node, Any] = {}
        self._readers: dict[Node, int] = {}

    def of(self, node: Node) -> Any:
        """The value of one node; what it is computed from is computed first."""
        pending = [node]
        with torch.no_grad():
            while pending:
                current = pending[-1]
                missing = [argument for argument in current.all_input_nodes if argument not in self._kept]
                if current in self._kept or not missing:
                    pending.pop()
                    self._compute(current)
                else:
                    pending.extend(missing)
        return self._kept[node]

    def forget(self, node: Node) -> None:
        """Free the value of a node that has been replaced."""
        del self._kept[node]

    def _compute(self, node: Node) -> None:
        if node in self._kept:
            return
        if node.op == "get_attr":
            self._kept[node] = self._editor.constant_value(node)
            return
        args, kwargs = map_arg((node.args, node.kwargs), self._kept.__getitem__)
        self._kept[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for argument in node.all_input_nodes:
            if argument not in self._readers:
                self._readers[argument] = sum(user in self._constants for user in argument.users)
            self._readers[argument] -= 1
            if not self._readers[argument]:
                del self._kept[argument]
