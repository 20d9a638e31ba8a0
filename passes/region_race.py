"""Parts of a program as programs of their own, each raced in two forms; parts of one form are measured once.

Examples are what the examples of the whole program bring the parts, in one run of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.extract import extract
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.race import Outcome, Race


@dataclass(frozen=True)
class Pair:
    """A part in two forms, which take and give the same; both without examples."""

    before: Program
    after: Program


def race_pairs(program: Program, pairs: Sequence[Pair], race: Race, told: Callable[[int, int], None]) -> list[Outcome]:
    """What was measured of each pair of parts of `program`; `told` hears how many of all forms are measured.

    Raises what `race` does.
    """
    forms = [(_form(pair.before), _form(pair.after)) for pair in pairs]
    first = {form: pairs[number] for number, form in reversed(list(enumerate(forms)))}
    values = _values(program, {spec.name for pair in first.values() for spec in pair.before.inputs})
    outcomes: dict[Hashable, Outcome] = {}
    for form in dict.fromkeys(forms):
        told(len(outcomes), len(first))
        pair = first[form]
        examples = tuple(values[spec.name] for spec in pair.before.inputs)
        outcomes[form] = race(replace(pair.before, examples=examples), replace(pair.after, examples=examples))
    return [outcomes[form] for form in forms]


def alone(program: Program, region: Collection[Node], held: Collection[Node] = ()) -> Program:
    """Nodes of the main graph as a program without examples; `held` are computed from weights and come along."""
    nodes = list(program.graph_module.graph.nodes)
    read = {item for node in region for item in node.all_input_nodes if item not in region}
    cut = [node for node in nodes if node in read and node not in held and _is_computed(node)]
    outputs = {node.name: node for node in nodes if node in region and any(user not in region for user in node.users)}
    return extract(program, cut, outputs)


def _is_computed(node: Node) -> bool:
    return node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)


def _values(program: Program, names: Collection[str]) -> dict[str, torch.Tensor]:
    """What nodes of the main graph are with the examples."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, value: Any) -> None:
        if name in names:
            found[name] = value.contiguous()

    with torch.no_grad():
        ProgramInterpreter(program.graph_module, see=see).run(
            *program.examples, *(item.initial for item in program.state)
        )
    return found


def _form(program: Program) -> Hashable:
    """Equal for programs that differ in names and in the numbers of their weights only."""
    nodes = list(program.graph_module.graph.nodes)
    number = {node: place for place, node in enumerate(nodes)}

    def spelled(node: Node) -> str:
        value = node.meta.get("val")
        shape = (value.dtype, tuple(map(str, value.shape))) if isinstance(value, torch.Tensor) else None
        args = map_arg((node.args, dict(node.kwargs)), lambda item: f"%{number[item]}")
        return f"{node.op} {node.target if node.op == 'call_function' else ''} {args} {shape}"

    return tuple(map(spelled, nodes))
