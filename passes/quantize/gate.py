"""Codes only where they pay: each region is raced against its float32 form on the target, and what is slower goes back.

A region is a set of operators between which values stay in codes, with the conversions at its borders: layers that
share codes, or that nothing but moves and pointwise operators lie between. Both of its forms are compiled as programs
of their own, the one in codes as `qdq-fusion` makes it, and run in turns on what the examples bring it; regions of one
form are measured once. What remains is raced as a whole against the whole float32 program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from graphopt.contract import PassContext, Region
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.passes.quantize.placement import MOVES, Placement
from graphopt.passes.quantize.scheme import Scheme
from graphopt.passes.region_race import Pair, alone, race_pairs
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
    """The scheme without the regions that are not faster, what was measured, the whole program last, and remarks."""

    scheme: Scheme
    regions: tuple[Region, ...]
    notes: tuple[str, ...]


def gated(scheme: Scheme, race: Race, context: PassContext) -> Gated:
    """`scheme` with every region of the main graph in float32 that is not measured to be faster in codes.

    Raises what `race` does: CompileError where a program has no lowering, UsageError where nothing can be measured.
    """
    found = find_regions(scheme)
    before = [alone(scheme.program, part.nodes) for part in found]
    pairs = [Pair(program, in_codes(replace(scheme, program=program))) for program in before]
    outcomes = race_pairs(
        scheme.program, pairs, race, lambda done, count: context.progress("quantize: measuring regions", done, count)
    )
    floats, raced = dict(scheme.floats), []
    for part, outcome in zip(found, outcomes, strict=True):
        raced.append(_told(part.coded, outcome))
        if not outcome.faster:
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
    return Gated(kept, tuple(raced), _not_raced(scheme))


def _not_raced(scheme: Scheme) -> tuple[str, ...]:
    """A remark on layers in branches, whose inputs the examples need not bring."""
    placements, name = scheme.survey()
    inside = [name(node) for placement in placements[1:] for node in placement.layers]
    if not inside:
        return ()
    return (
        f"{len(inside)} operators in branches of torch.cond stay in codes unmeasured, {inside[0]} the first: the "
        "examples may not enter a branch; name them in `ignored` to keep them float32",
    )


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
