"""Constant tensors inside branches of torch.cond become operands: torch neither decomposes nor saves them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from graphopt.capture.normal_form import fake_mode
from graphopt.program import copy_module, get_attribute, set_attribute


def hoisted(exported: ExportedProgram) -> ExportedProgram:
    """The same program without tensors inside its branches; itself where it has none."""
    if not any(_inner_constants(child) for child in _children(exported.graph_module)):
        return exported
    module = copy_module(exported.graph_module)
    fresh = hoist_constants(module, "branch_constant")
    specs: list[InputSpec] = []
    for node in [n for n in module.graph.find_nodes(op="get_attr") if str(n.target) in fresh]:
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            place = module.graph.placeholder(f"c_{node.target}")
        place.target = place.name
        place.meta = dict(node.meta)
        node.replace_all_uses_with(place)
        module.graph.erase_node(node)
        delattr(module, str(node.target))
        specs.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(place.name), str(node.target)))
    signature = exported.graph_signature
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature([*specs, *signature.input_specs], list(signature.output_specs)),
        state_dict=dict(exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=list(exported.module_call_graph),
        example_inputs=exported.example_inputs,
        constants={**exported.constants, **fresh},
        verifiers=exported.verifiers,
    )


def hoist_constants(module: GraphModule, prefix: str) -> dict[str, torch.Tensor]:
    """Move constants out of all branches, into attributes of `module` named `prefix_0`, `prefix_1`, ...; edits it."""
    mode = fake_mode(module)
    fresh: dict[str, torch.Tensor] = {}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        added = []
        for value in _open_branches(module, node, mode):
            target = f"{prefix}_{len(fresh)}"
            while hasattr(module, target):
                target += "_"
            set_attribute(module, target, value)
            fresh[target] = value
            with module.graph.inserting_before(node):
                read = module.graph.create_node("get_attr", target)
            read.meta["val"] = mode.from_tensor(value, static_shapes=True)
            added.append(read)
        node.args = (*node.args[:3], (*_operands(node), *added))
    if fresh:
        module.recompile()
    return fresh


def _open_branches(owner: GraphModule, node: Node, mode: Any) -> list[torch.Tensor]:
    """Give both branches placeholders for the constants of either; returns these constants in order."""
    branches = [get_attribute(owner, str(argument.target)) for argument in _branches(node)]
    needed = {}
    for branch in branches:
        for inner in branch.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            _pull_up(branch, inner, mode)
        needed.update({id(value): value for value in _constants(branch).values()})
    for branch in branches:
        _take(branch, list(needed.values()), mode)
    return list(needed.values())


def _pull_up(branch: GraphModule, node: Node, mode: Any) -> None:
    """Constants of a cond inside a branch become constants of the branch."""
    added = []
    for value in _open_branches(branch, node, mode):
        target = next(name for i in range(10_000) if not hasattr(branch, name := f"inner_constant_{i}"))
        set_attribute(branch, target, value)
        with branch.graph.inserting_before(node):
            added.append(branch.graph.create_node("get_attr", target))
    node.args = (*node.args[:3], (*_operands(node), *added))


def _take(branch: GraphModule, values: list[torch.Tensor], mode: Any) -> None:
    last = branch.graph.find_nodes(op="placeholder")
    own = _constants(branch)
    anchor = last[-1].next if last else next(iter(branch.graph.nodes))
    places = []
    for value in values:
        with branch.graph.inserting_before(anchor):
            place = branch.graph.placeholder("constant")
        place.target = place.name  # made unique
        place.meta["val"] = mode.from_tensor(value, static_shapes=True)
        places.append(place)
    for value, place in zip(values, places, strict=True):  # the anchor may be a constant, which goes
        for node in [node for node, constant in own.items() if constant is value]:
            node.replace_all_uses_with(place)
            branch.graph.erase_node(node)
    for target in {str(node.target) for node in own}:
        path, _, attribute = target.rpartition(".")
        delattr(get_attribute(branch, path) if path else branch, attribute)
    branch.recompile()


def _children(module: GraphModule) -> list[GraphModule]:
    return [child for child in module.modules() if isinstance(child, GraphModule) and child is not module]


def _inner_constants(branch: GraphModule) -> bool:
    return bool(_constants(branch))


def _constants(branch: GraphModule) -> Mapping[Node, torch.Tensor]:
    found = {node: get_attribute(branch, str(node.target)) for node in branch.graph.find_nodes(op="get_attr")}
    return {node: value for node, value in found.items() if isinstance(value, torch.Tensor)}


def _branches(node: Node) -> Any:
    return node.args[1:3]


def _operands(node: Node) -> Any:
    return node.args[3]
