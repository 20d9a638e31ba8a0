"""A part of a program as a program of its own: what computes some values from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.analysis.view import node_kinds
from graphopt.capture.expressions import size_text
from graphopt.program import Program, TensorSpec, get_attribute, set_attribute


def extract(program: Program, cut: Sequence[Node], outputs: Mapping[str, Node]) -> Program:
    """What computes `outputs` (name -> node of the main graph) once the values of `cut` are given.

    Inputs are those of `cut` that are read, under the names of their nodes, and inputs of the program that are read
    besides. Weights are shared. There are no examples; raises nothing of its own.
    """
    kinds = node_kinds(program)
    needed: set[Node] = set()
    pending = list(outputs.values())
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            if node not in cut:
                pending.extend(node.all_input_nodes)
    graph, root = Graph(), torch.nn.Module()
    values: dict[Node, Node] = {}
    given = [node for node in kinds if node in needed and (node in cut or kinds[node] == "input")]
    for node in given:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in kinds:
        if node in needed and node not in values:
            if node.op == "get_attr":
                set_attribute(root, str(node.target), get_attribute(program.graph_module, str(node.target)))
            args, kwargs = map_arg((node.args, node.kwargs), lambda item: values[item])
            values[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            values[node].meta = dict(node.meta)
    output = graph.output(tuple(values[node] for node in outputs.values()))
    output.meta["val"] = tuple(node.meta["val"] for node in outputs.values())
    return replace(
        program,
        graph_module=GraphModule(root, graph),
        inputs=tuple(_spec(node.name, node, program) for node in given),
        outputs=tuple(_spec(name, node, program) for name, node in outputs.items()),
        examples=(),
        state=(),
        history=(),
        exits=None,
    )


def _spec(name: str, node: Node, program: Program) -> TensorSpec:
    known = {spec.name: spec for spec in program.inputs}
    if node.op == "placeholder" and name in known:
        return known[name]
    value: torch.Tensor = node.meta["val"]
    return TensorSpec(name, value.dtype, tuple(size_text(size, program.symbols) for size in value.shape))
