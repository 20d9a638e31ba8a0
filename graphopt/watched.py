"""A program that also gives values from its inside: what a teacher's layers give, what a gate is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from graphopt.capture.expressions import size_text
from graphopt.errors import UnknownNameError
from graphopt.program import Program, TensorSpec


def with_outputs(program: Program, nodes: Mapping[str, str]) -> Program:
    """The program, sharing its weights, with the values of these nodes of its main graph as further outputs.

    `nodes` maps names of outputs to names of nodes. Raises UnknownNameError for a node that is not there.
    """
    watched = program.copy()
    by_name = {node.name: node for node in watched.graph_module.graph.nodes}
    found = []
    for name in nodes.values():
        if name not in by_name:
            raise UnknownNameError(f"node of {program.name}", name, by_name)
        found.append(by_name[name])
    specs = tuple(_spec(name, node, program) for name, node in zip(nodes, found, strict=True))
    (output,) = watched.graph_module.graph.find_nodes(op="output")
    results = list(output.args[0])  # outputs, then state
    results[len(program.outputs) : len(program.outputs)] = found
    output.args = (tuple(results),)
    watched.graph_module.recompile()
    return replace(watched, outputs=(*program.outputs, *specs))


def without_outputs(program: Program, specs: Sequence[TensorSpec]) -> Program:
    """The program, sharing its weights, without these of its outputs and what only they need."""
    kept = [index for index, spec in enumerate(program.outputs) if spec not in specs]
    less = program.copy()
    (output,) = less.graph_module.graph.find_nodes(op="output")
    results = output.args[0]
    output.args = (tuple(results[index] for index in kept) + tuple(results[len(program.outputs) :]),)
    less.graph_module.graph.eliminate_dead_code()
    less.graph_module.recompile()
    return replace(less, outputs=tuple(program.outputs[index] for index in kept))


def _spec(name: str, node: Node, program: Program) -> TensorSpec:
    value: torch.Tensor = node.meta["val"]
    return TensorSpec(name, value.dtype, tuple(size_text(size, program.symbols) for size in value.shape))
