"""Codes only where they pay: each region is raced against its float32 form on the target, and what is slower goes back.

A region is a set of operators between which values stay in codes, with the conversions at its borders: layers that
share codes, or that nothing but moves and pointwise operators lie between. Both of its forms are compiled as programs
of their own, the one in codes as `qdq-fusion` makes it, and run in turns on what the examples bring it; regions of one
form are measured once. What remains is raced as a whole against the whole float32 program.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.contract import PassContext, Region
from graphopt.extract import extract
from graphopt.interpreter import ProgramInterpreter
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.passes.quantize.placement import MOVES, Placement
from graphopt.passes.quantize.scheme import Scheme
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.race import Outcome, Race


@dataclass(frozen=True)
class Part:
    """A region: `coded` operators read codes or have a weight in codes, `nodes` are these and what lies between."""

    coded: tuple[Node, ...]
    nodes: frozenset[Node]


@dataclass(frozen=True)
class Gated:
    """The scheme without the regions that are not faster, and what was measured, the whole program last."""

    scheme: Scheme
    regions: tuple[Region, ...]


def gated(scheme: Scheme, race: Race, context: PassContext) -> Gated:
    """`scheme` with every region of the main graph in float32 that is not measured to be faster in codes.

    Raises what `race` does: CompileError where a program has no lowering, UsageError where nothing can be measured.
    """
    found = find_regions(scheme)
    outcomes: dict[Hashable, Outcome] = {}
    floats = dict(scheme.floats)
    raced = []
    for number, part in enumerate(found):
        context.progress("quantize: measuring regions", number, len(found))
        before = _alone(scheme.program, part)
        after = in_codes(replace(scheme, program=before))
        key = _form(before), _form(after)
        if key not in outcomes:
            outcomes[key] = race(before, after)
        raced.append(_told(part.coded, outcomes[key]))
        if not outcomes[key].faster:
            floats |= {node.name: "its region is not measured to be faster in codes" for node in part.coded}
    kept = replace(scheme, floats=floats)
    if left := find_regions(kept):
        outcome = race(scheme.program, in_codes(kept))
        raced.append(_told((), outcome))
        if not outcome.faster:
            names = {
                node.name: "the program is not measured to be faster in codes" for part in left for node in part.coded
            }
            kept = replace(kept, floats={**floats, **names})
    return Gated(kept, tuple(raced))


def _told(nodes: Iterable[Node], outcome: Outcome) -> Region:
    names = tuple(node.name for node in nodes)
    return Region(names, outcome.first.seconds, outcome.second.seconds, outcome.faster)


def in_codes(scheme: Scheme) -> Program:
    """The program of a scheme as it computes with the codes."""
    return QDQFusion().run(scheme.write(PassContext()).program, PassContext()).program


def find_regions(scheme: Scheme) -> list[Part]:
    """The regions of the main graph, in order of execution."""
    placement = scheme.survey()[0][0]
    order = {node: number for number, node in enumerate(scheme.program.graph_module.graph.nodes)}
    own = {node.name: node for node in order}  # the survey looked at a copy
    groups: dict[str, str] = {}

    def root(name: str) -> str:
        while groups.setdefault(name, name) != name:
            name = groups[name]
        return name

    coded = {node.name for node, layer in placement.layers.items() if layer.weight is not None and scheme.weight}
    coded |= {node.name for node in placement.readers}
    between: dict[str, set[str]] = {}
    first: dict[str, str] = {}  # the first reader of a scale
    for node, value in _reads(placement):
        shared = placement.roots[value].name
        groups[root(node.name)] = root(first.setdefault(shared, node.name))
        path = []
        while value.name not in coded and (source := _passed(value)) is not None:
            path.append(value.name)
            value = source
        if value.name in coded:
            groups[root(node.name)] = root(value.name)
            between.setdefault(node.name, set()).update(path)
    members: dict[str, list[str]] = {}
    for name in sorted(coded, key=lambda name: order[own[name]]):
        members.setdefault(root(name), []).append(name)
    found = []
    for names in members.values():
        inner = {name for each in names for name in between.get(each, ())}
        found.append(Part(tuple(own[name] for name in names), frozenset(own[name] for name in {*names, *inner})))
    return found


def _reads(placement: Placement) -> Iterator[tuple[Node, Node]]:
    for node, values in placement.readers.items():
        yield from ((node, value) for value in values)


def _passed(node: Node) -> Node | None:
    """What a move or a pointwise operator on one computed value reads."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    read = [item for item in node.all_input_nodes if item.op != "get_attr" and _is_tensor(item)]
    return read[0] if (pointwise or node.target in MOVES) and len(read) == 1 else None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _alone(program: Program, region: Part) -> Program:
    """The region's float32 form, with what the examples of the program bring it as examples."""
    read = {item for node in region.nodes for item in node.all_input_nodes if item not in region.nodes}
    cut = [node for node in program.graph_module.graph.nodes if node in read and _is_computed(node)]
    outputs = {
        node.name: node
        for node in program.graph_module.graph.nodes
        if node in region.nodes and any(user not in region.nodes for user in node.users)
    }
    part = extract(program, cut, outputs)
    names = [node.name for node in part.graph_module.graph.find_nodes(op="placeholder")]
    values: dict[str, Any] = {}

    def see(name: str, value: Any) -> None:
        if name in names:
            values[name] = value

    with torch.no_grad():
        ProgramInterpreter(program.graph_module, see=see).run(
            *program.examples, *(item.initial for item in program.state)
        )
    return replace(part, examples=tuple(values[name].contiguous() for name in names))


def _is_computed(node: Node) -> bool:
    return node.op != "get_attr" and _is_tensor(node)


def _form(program: Program) -> Hashable:
    """Equal for programs that differ in names and in the numbers of their weights only."""
    nodes = list(program.graph_module.graph.nodes)
    number = {node: place for place, node in enumerate(nodes)}

    def spelled(node: Node) -> str:
        value = node.meta.get("val")
        shape = (value.dtype, tuple(map(str, value.shape))) if isinstance(value, torch.Tensor) else None
        args = map_arg((node.args, dict(node.kwargs)), lambda item: f"%{number[item]}")
        return f"{node.op} {node.target if node.op == 'call_function' else ''} {args} {shape}"

    return tuple(map(spelled, nodes)), tuple(tuple(value.shape) for value in program.examples)
