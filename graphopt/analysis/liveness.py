"""What a region of a graph reads from outside and what of it is read outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from graphopt.analysis.view import Kind


@dataclass(frozen=True)
class Liveness:
    """The border of a region, each node once: what enters in the order it is read, what leaves in order of execution.

    `inputs` are values computed outside, `weights`, `modules` and `sizes` those of that kind; `live_outs` are nodes of
    the region that a node outside reads, the graph's output node among them.
    """

    inputs: tuple[Node, ...]
    weights: tuple[Node, ...]
    modules: tuple[Node, ...]
    sizes: tuple[Node, ...]
    live_outs: tuple[Node, ...]


def region_liveness(kinds: Mapping[Node, Kind], region: Iterable[Node]) -> Liveness:
    """The border of a set of nodes of the graph that `kinds` (of `node_kinds`) tells of; linear in its edges."""
    nodes = sorted(region)
    inside = set(nodes)
    read = dict.fromkeys(argument for node in nodes for argument in node.all_input_nodes if argument not in inside)

    def of(*wanted: Kind) -> tuple[Node, ...]:
        return tuple(node for node in read if kinds[node] in wanted)

    live_outs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    return Liveness(of("input", "data", "constant"), of("weight"), of("module"), of("size"), live_outs)


def ancestors(node: Node) -> set[Node]:
    """The node and every call that it is computed from: what must have run for it, without inputs and attributes."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current.op.startswith("call_") and current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found
