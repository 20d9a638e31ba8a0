"""Graphs to compare: optimized models, and chains written by hand, as long and with the names that a test needs."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import optimize
from graphopt.program import PROVENANCE, Program, TensorSpec
from tests.models import program

aten = torch.ops.aten


@functools.cache
def optimized(name: str) -> tuple[Program, dict[str, Any]]:
    """A model of tests/models.py at O2, and the report; without measured errors where measuring takes long."""
    result = optimize(program(name), "O2", verify="structure" if name == "bert" else "numeric")
    return result.program, result.report.to_json()


def chain(length: int, replaced: Collection[int] = (), removed: Collection[int] = ()) -> Program:
    """x -> step_0 -> step_1 ...: a relu each; `replaced` are sigmoids that stand for it, `removed` are missing."""
    graph = Graph()
    node = _valued(graph.placeholder("x"))
    for number in range(length):
        if number in removed:
            continue
        target = aten.sigmoid.default if number in replaced else aten.relu.default
        name = f"better_{number}" if number in replaced else f"step_{number}"
        node = _valued(graph.create_node("call_function", target, (node,), name=name))
        node.meta["nn_module_stack"] = {"": (f"layers.{number // 10}", "Layer")}
        if number in replaced:
            node.meta["custom"] = {PROVENANCE: {"rule": "sharpen", "from": [f"step_{number}"]}}
    graph.output((node,))
    return program_of(graph)


def program_of(graph: Graph) -> Program:
    """A program with one input x and one output of shape [2, 3]."""
    spec = TensorSpec("x", torch.float32, (2, 3))
    module = GraphModule(torch.nn.Module(), graph)
    return Program(module, (spec,), (TensorSpec("output", torch.float32, (2, 3)),), (torch.ones(2, 3),), name="chain")


def _valued(node: Node) -> Node:
    node.meta["val"] = torch.empty(2, 3, device="meta")
    return node
