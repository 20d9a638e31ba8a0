"""A Program as an ExportedProgram: weights and state become inputs of the graph, as torch.export has them."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphopt.capture.hoist import hoist_constants
from graphopt.capture.normal_form import fake_mode, note_names
from graphopt.program import Program, copy_module, get_attribute, placeholder_name, set_attribute


def lift(program: Program) -> ExportedProgram:
    """An ExportedProgram that computes what the program does; tensors are shared, graphs are copied."""
    module = copy_module(program.graph_module)
    note_names(module)
    hoist_constants(module, "branch_constant")
    graph, root = Graph(), torch.nn.Module()
    weights = _weights(module)
    inputs: list[InputSpec] = []
    places: dict[str, Node] = {}
    mode = fake_mode(module)
    for target, value in weights.items():
        node = graph.placeholder(f"w_{placeholder_name(target)}")
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        places[target] = node
        kind = InputKind.PARAMETER if isinstance(value, torch.nn.Parameter) else InputKind.BUFFER
        persistent = None if kind == InputKind.PARAMETER else True
        inputs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
    placeholders = module.graph.find_nodes(op="placeholder")
    count = len(program.inputs)
    states, users = placeholders[count:], placeholders[:count]
    values: dict[Node, Node] = {}
    for node in (*states, *users):
        values[node] = graph.placeholder(str(node.target))
        values[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        _copy(node, module, graph, root, values, places)
    output = graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    mutated, returned = results[len(program.outputs) :], results[: len(program.outputs)]
    output.args = ((*mutated, *returned),)
    inputs += [
        InputSpec(InputKind.BUFFER, TensorArgument(values[node].name), state.spec.name, persistent=True)
        for node, state in zip(states, program.state, strict=True)
    ]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(values[node].name), None) for node in users]
    outputs = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), state.spec.name)
        for node, state in zip(mutated, program.state, strict=True)
    ]
    outputs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned]
    return ExportedProgram(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={**weights, **{state.spec.name: state.initial for state in program.state}},
        range_constraints=_ranges(program),
        module_call_graph=[ModuleCallEntry("", _signature(program, [str(node.target) for node in users]))],
        example_inputs=(program.examples, {}),
        constants={},
    )


def _weights(module: GraphModule) -> dict[str, torch.Tensor]:
    weights = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = get_attribute(module, str(node.target))
        if isinstance(value, torch.Tensor):
            weights[str(node.target)] = value
    return weights


def _copy(
    node: Node,
    module: GraphModule,
    graph: Graph,
    root: torch.nn.Module,
    values: dict[Node, Node],
    places: dict[str, Node],
) -> None:
    if node.op == "placeholder":
        return
    if node.op == "get_attr" and str(node.target) in places:
        values[node] = places[str(node.target)]
        return
    if node.op == "get_attr":
        set_attribute(root, str(node.target), get_attribute(module, str(node.target)))
    values[node] = graph.node_copy(node, lambda argument: values[argument])


def _ranges(program: Program) -> dict[sympy.Symbol, Any]:
    ranges = {}
    for place in program.graph_module.graph.find_nodes(op="placeholder"):
        for size in place.meta["val"].shape:
            for symbol in size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ():
                bounds = program.sizes[program.symbols[str(symbol)]]
                ranges[symbol] = ValueRanges(bounds.low, int_oo if bounds.high is None else bounds.high)
    return ranges


def _signature(program: Program, arguments: list[str]) -> ModuleCallSignature:
    """Called with the inputs in order; returns one tensor, or a dict where outputs have names of their own."""
    names = [spec.name for spec in program.outputs]
    result: object = list(names)
    if names == ["output"]:
        result = "output"
    elif all(not name.startswith("output_") for name in names):
        result = dict.fromkeys(names, 0)
    else:
        result = tuple(names)
    return ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_flatten((tuple(arguments), {}))[1],
        out_spec=pytree.tree_flatten(result)[1],
        forward_arg_names=arguments,
    )
