"""Both branches of every `torch.cond`: a wrong one goes unseen while no input takes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.checking.samples import CANNOT_RUN, Drawn, failure
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program, full_name, set_attribute

Sides = tuple[bool, ...]  # the side taken by the conditions of the main graph, of its branches, of theirs
Taken = frozenset[tuple[str, bool]]  # (condition by its path, side)

_SCALES = (1.0, -1.0, 100.0, 0.0)
_SEEDS = 4
_FLAG = "graphopt_forced"


def conditions(program: Program) -> tuple[str, ...]:
    """Every `torch.cond`, as the path of its graph and its name ("true_graph_0.cond"), outer ones first."""
    return tuple(full_name(path, node.name) for path, module in program.graphs() for node in _conditions(module))


def side_choices(program: Program) -> list[Sides]:
    """Choices with which every branch runs at least once, for conditions up to two deep; none without conditions."""
    found = conditions(program)
    if not found:
        return []
    depth = min(2, 1 + max(name.count(".") for name in found))
    return list(itertools.product((True, False), repeat=depth))


def forced(program: Program, sides: Sides) -> Program:
    """A copy in which the conditions at each depth take the side chosen for it, whatever their predicates say."""
    result = program.copy()
    for path, module in result.graphs():
        depth = path.count(".") + 1 if path else 0
        for node in _conditions(module) if depth < len(sides) else []:
            _force(module, node, sides[depth])
        module.recompile()
    return result


def _force(module: GraphModule, node: Node, side: bool) -> None:
    name = f"{_FLAG}_{node.name}"
    set_attribute(module, name, torch.tensor(side))
    predicate: Any = node.args[0]
    with module.graph.inserting_before(node):
        flag = module.graph.get_attr(name)
    if isinstance(predicate, Node):
        flag.meta["val"] = predicate.meta.get("val")
    node.args = (flag, *node.args[1:])


def search_branches(program: Program, given: Sequence[tuple[torch.Tensor, ...]]) -> tuple[list[Drawn], list[str]]:
    """Drawn inputs that take branches no given input takes, and a sentence for each branch that none was found for."""
    wanted = {(name, side) for name in conditions(program) for side in (True, False)}
    for inputs in given if wanted else ():
        wanted -= sides_taken(program, inputs)
    found = []
    for drawn in _tries(program) if wanted else ():
        if failure(program, drawn.inputs):
            continue
        new = sides_taken(program, drawn.inputs) & wanted
        if new:
            found.append(drawn)
            wanted -= new
        if not wanted:
            break
    return found, [f"not checked: the {str(side).lower()} branch of {name}" for name, side in sorted(wanted)]


def _tries(program: Program) -> Iterator[Drawn]:
    sizes = check_sizes(program)[0]
    for seed, scale in itertools.product(range(_SEEDS), _SCALES):
        inputs = draw_inputs(program, sizes, seed)
        pairs = zip(program.inputs, inputs, strict=True)
        scaled = (value if spec.name in program.bound else _scaled(value, scale) for spec, value in pairs)
        yield Drawn(sizes, tuple(scaled))


def _scaled(value: torch.Tensor, scale: float) -> torch.Tensor:
    if value.is_floating_point() or value.is_complex():
        return value * scale
    return torch.zeros_like(value) if scale == 0 else value


def sides_taken(program: Program, inputs: tuple[torch.Tensor, ...]) -> Taken:
    """Which branches PyTorch takes for these inputs, from the initial state; none where it cannot run them."""
    taken: set[tuple[str, bool]] = set()
    interpreter = ProgramInterpreter(program.graph_module, take=lambda name, side: taken.add((name, side)))
    try:
        with torch.no_grad():
            interpreter.run(*inputs, *(item.initial for item in program.state))
    except CANNOT_RUN:
        return frozenset()
    return frozenset(taken)


def _conditions(module: GraphModule) -> list[Node]:
    return module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
