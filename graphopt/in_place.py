"""Which state a compiled program may write into, in place of returning a new tensor: caches that are written to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node
from torch.utils import _pytree

from graphopt.program import Program

_WRITES = (torch.ops.aten.index_copy.default,)


def written_state(programs: Iterable[Program]) -> frozenset[str]:
    """Names of the state that every program which has it writes to at some places, and reads only after that."""
    written: set[str] = set()
    returned: set[str] = set()
    for program in programs:
        found = {name for name, _ in writes(program)}
        written |= found
        returned |= {item.spec.name for item in program.state} - found
    return frozenset(written - returned)


def writes(program: Program) -> list[tuple[str, Node]]:
    """(name of the state, the node that is its new value) where the old value is read by that node alone."""
    graph = program.graph_module.graph
    places: list[Node] = graph.find_nodes(op="placeholder")[len(program.inputs) :]
    (values,) = graph.output_node().args
    assert isinstance(values, (tuple, list))
    found = []
    for item, place, result in zip(program.state, places, values[len(program.outputs) :], strict=True):
        assert isinstance(result, Node)
        fixed = all(isinstance(size, int) for size in item.spec.shape)
        if fixed and result.target in _WRITES and result.args[0] is place and _read_as_written(place, result):
            found.append((item.spec.name, result))
    return found


def _read_as_written(place: Node, result: Node) -> bool:
    """Whether nothing reads `place` but `result`, which writes to it, and that not as what it writes or where."""
    return set(place.users) == {result} and place not in _pytree.tree_leaves((result.args[1:], result.kwargs))
