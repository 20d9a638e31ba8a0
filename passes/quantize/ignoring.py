"""Which operators a user wants left in float32: by name, by a pattern of names, or by type."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch.fx import Node

from graphopt.errors import UsageError
from graphopt.matcher import operator_name
from graphopt.program import Program, full_name


def ignored_nodes(program: Program, entries: Sequence[str]) -> dict[str, str]:
    """The nodes that `entries` mean, by full name, and the entry that means them.

    An entry is a name or a pattern with * and ? of a node ("true_graph_0.linear"), of a module that it came from
    ("encoder.layer.0.attention" means all inside), or an operator ("conv2d", "aten.conv2d"). Raises UsageError for one
    that means nothing in this program.
    """
    found: dict[str, str] = {}
    for entry in entries:
        matched = [
            full_name(path, node.name)
            for path, module in program.graphs()
            for node in module.graph.nodes
            if node.op == "call_function" and _means(entry, node, full_name(path, node.name))
        ]
        if not matched:
            raise UsageError(
                f"ignored entry {entry!r} is no node, module or operator of {program.name}; write a name that "
                "`graphopt inspect` shows, a pattern such as '*head*', or an operator such as 'conv2d'"
            )
        for name in matched:
            found.setdefault(name, entry)
    return found


def _means(entry: str, node: Node, name: str) -> bool:
    return any(fnmatchcase(word, entry) for word in (name, *_operators(node), *_modules(node)))


def _operators(node: Node) -> Collection[str]:
    """ "aten.conv2d.default", "aten.conv2d" and "conv2d"."""
    whole = operator_name(node.target)
    parts = whole.split(".")
    return {whole, *(part for part in (".".join(parts[:2]), parts[1] if len(parts) > 1 else "") if part)}


def _modules(node: Node) -> Collection[str]:
    """The paths of the modules around the node, outermost first: "encoder", "encoder.layer.0"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(item[0]) for item in stack.values()]
    return {".".join(path.split(".")[:count]) for path in paths for count in range(1, path.count(".") + 2)}
