"""A graph as networkx sees it, and what each node means for the flow of data.

Data flows where the contents of a tensor are read. Weights, constants and sizes are no data: no path runs through
them, and a size read from a tensor or a tensor made in another's shape ends the path.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import networkx
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from graphopt.errors import UnknownNameError
from graphopt.program import Program, get_attribute

Kind = Literal["input", "weight", "module", "data", "constant", "size", "output"]

_ONLY_SIZES = {  # operators that read nothing of a tensor but its sizes, strides and type
    *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous"),
    *(f"new_{filling}" for filling in ("empty", "empty_strided", "full", "ones", "zeros")),
    *(f"{filling}_like" for filling in ("empty", "full", "ones", "zeros", "rand", "randn", "randint")),
}
_SIZES_OF_SECOND = {"expand_as", "view_as", "reshape_as", "type_as"}


def program_view(program: Program, path: str = "") -> networkx.DiGraph:
    """The graph at `path` ("" is the main one) as a DiGraph over its nodes, in linear time.

    Nodes are those of torch.fx, in order of execution, with the attribute `kind`; edges lead from argument to user
    and have the attribute `data`, whether contents flow along. Raises UnknownNameError for a path with no graph.
    """
    kinds = node_kinds(program, path)
    graph = networkx.DiGraph()
    graph.add_nodes_from((node, {"kind": kind}) for node, kind in kinds.items())
    for node, kind in kinds.items():
        contents = read_contents(node) if kind in ("data", "output") else ()
        for argument in node.all_input_nodes:
            flows = argument in contents and kinds[argument] in ("input", "data")
            graph.add_edge(argument, node, data=flows)
    return graph


def node_kinds(program: Program, path: str = "") -> dict[Node, Kind]:
    """What each node of the graph at `path` is, in order of execution.

    `input` (a placeholder for an input or state), `weight` (a tensor attribute, or in a sub-graph the operand that
    one is passed as), `module` (a sub-graph), `data` (depends on the contents of an input), `constant` (a tensor that
    does not), `size` (a number that does not), `output`. Raises UnknownNameError for a path with no graph.
    """
    modules = dict(program.graphs())
    if path not in modules:
        raise UnknownNameError("graph", path, modules)
    return _kinds(modules[path], _operand_kinds(program, modules, path) if path else {})


def _kinds(module: GraphModule, operands: Mapping[str, Kind]) -> dict[Node, Kind]:
    kinds: dict[Node, Kind] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = operands.get(node.name, "input")
        elif node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            kinds[node] = "weight" if isinstance(value, torch.Tensor) else "module"
        elif node.op == "output":
            kinds[node] = "output"
        elif any(kinds[argument] in ("input", "data") for argument in read_contents(node)):
            kinds[node] = "data"
        else:
            kinds[node] = "constant" if tensors(node) else "size"
    return kinds


def _operand_kinds(program: Program, modules: Mapping[str, GraphModule], path: str) -> dict[str, Kind]:
    """By name of placeholder, for those that every call of the sub-graph gives something other than data."""
    parent, _, name = path.rpartition(".")
    outside = node_kinds(program, parent)
    inside = [node.name for node in modules[path].graph.nodes if node.op == "placeholder"]
    found: dict[str, Kind] = {}
    for attribute in modules[parent].graph.find_nodes(op="get_attr"):
        for call in attribute.users if attribute.target == name else ():
            for placeholder, operand in zip(inside, _operands(call), strict=False):
                kind = outside[operand] if isinstance(operand, Node) else "size"
                found[placeholder] = kind if found.get(placeholder, kind) == kind else "input"
    return {placeholder: kind for placeholder, kind in found.items() if kind in ("weight", "constant", "size")}


def _operands(call: Node) -> Sequence[object]:
    last = call.args[-1] if isinstance(call.target, HigherOrderOperator) and call.args else ()
    return last if isinstance(last, (list, tuple)) else ()


def read_contents(node: Node) -> Sequence[Node]:
    """The arguments of which more than sizes and types is read."""
    name = _operator_name(node.target)
    if name in _ONLY_SIZES:
        return ()
    if name in _SIZES_OF_SECOND:
        return node.all_input_nodes[:1]
    return node.all_input_nodes


@functools.cache
def _operator_name(target: object) -> str:
    return target._schema.name.rpartition("::")[2] if isinstance(target, OpOverload) else ""


def tensors(node: Node) -> list[torch.Tensor]:
    """The tensors that the node's value is or holds; none for a size, which is a number."""
    value = node.meta.get("val")
    leaves = _pytree.tree_leaves(value) if isinstance(value, (tuple, list, dict)) else [value]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def module_path(nodes: Sequence[Node]) -> str:
    """The innermost module that all the nodes came from ("encoder.layer.0"), "" where they have no names: a hint."""
    stacks = [[path for path, _ in stack.values()] for node in nodes if (stack := node.meta.get("nn_module_stack"))]
    if not stacks or len(stacks) < len(nodes):
        return ""
    common = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        common = str(level[0])
    return common
