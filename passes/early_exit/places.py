"""Where a network may be left: values of its main stream that its own head can read in place of the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.blocks import find_repeats
from graphopt.analysis.cost import node_costs
from graphopt.analysis.cut_points import cut_points
from graphopt.analysis.liveness import ancestors
from graphopt.capture.quiet import quiet
from graphopt.errors import PropagationError, UnknownNameError, UsageError
from graphopt.matcher import argument
from graphopt.program import Program
from graphopt.propagate import changes_downstream, find_mode, value_key

aten = torch.ops.aten

WEIGHTS: Mapping[Any, str] = {aten.linear.default: "weight", aten.addmm.default: "mat2", aten.mm.default: "mat2"}
INPUTS: Mapping[Any, str] = {aten.linear.default: "input", aten.addmm.default: "mat1", aten.mm.default: "self"}


@dataclass(frozen=True)
class Head:
    """What makes the outputs of the last value of the stream, `source`: `nodes` in order of execution.

    `product` is the last product by a weight that all outputs are computed from; None where there is none, as in what
    only pools and scales.
    `pooled` is its first value [samples, width] that all outputs are computed from.
    """

    source: Node
    nodes: tuple[Node, ...]
    product: Node | None
    pooled: Node | None


@dataclass(frozen=True)
class Places:
    """The head, the values after which an exit may be, in order of execution, and why others may not."""

    head: Head
    exits: tuple[Node, ...]
    refused: tuple[tuple[Node, str], ...] = ()


def find_places(program: Program, chosen: str | tuple[int | str, ...], needs_product: bool) -> Places | str:
    """The places that `chosen` means, or a clause that says why there are none.

    "auto" means every block's end, or without repeated blocks every cut point that work lies behind; integers are
    numbers of those from 0, words names of nodes. The head starts at the end of the last block, where the head is less
    work than a block, else at the last cut point that leaves any place before it. With `needs_product` it holds a
    product by a weight, without it one or a pooled value. Raises UnknownNameError for a node that is none.
    """
    (output,) = program.graph_module.graph.find_nodes(op="output")
    ranks = [len(spec.shape) for spec in program.outputs]
    if not all(ranks) or len({value_key(node.meta["val"])[2][0] for node in output.args[0]}) != 1:
        return "its outputs have no first axis of one size, which would count samples"
    if not 2 <= ranks[0] <= 3:
        return f"its first output has {ranks[0]} axes, not those of samples, perhaps steps, and classes"
    cuts = [cut.node for cut in cut_points(program) if isinstance(cut.node.meta.get("val"), torch.Tensor)]
    work = Work(program)
    blocks = [block for repeat in find_repeats(program) for block in repeat.blocks]
    ends = [block.output for block in blocks]
    sources = list(reversed(cuts[1:]))
    if ends and max(ends) in sources and work.after(max(ends), program) < work.of(blocks[ends.index(max(ends))].nodes):
        sources.insert(0, max(ends))
    for source in sources:
        position = cuts.index(source)
        head = head_after(program, source, cuts[position + 1 :])
        if head is None or (head.product is None and (needs_product or head.pooled is None)):
            continue
        candidates = [node for node in cuts[:position] if work.between(node, source)]
        reasons = {node: _why_not(program, head, node) for node in candidates}
        fitting = tuple(node for node in candidates if reasons[node] is None)
        if fitting:
            last = {work.until(node): node for node in fitting if work.until(node)}
            places = Places(head, tuple(node for node in fitting if node in ends) or tuple(last.values()))
            refused = {node: reason for node, reason in reasons.items() if reason is not None}
            return places if chosen == "auto" else _chosen(program, chosen, places, fitting, refused)
    if needs_product:
        return "no value before the last product fits its head, which is where an exit would be"
    return "no value of the main stream fits what comes after its last one"


class Work:
    """Multiply-accumulates of nodes at the sizes of the examples."""

    def __init__(self, program: Program) -> None:
        self.macs = {node: cost.macs for node, cost in node_costs(program).items()}
        self._known: dict[Node, int] = {}

    def until(self, node: Node) -> int:
        """Of everything that the node is computed from, itself included."""
        if node not in self._known:
            self._known[node] = sum(self.macs[item] for item in ancestors(node))
        return self._known[node]

    def of_parts(self, ends: Iterable[Iterable[Node]]) -> tuple[int, ...]:
        """Of all that is needed for the first of these groups of nodes, for the first two, and so on."""
        needed: set[Node] = set()
        found = []
        for group in ends:
            for node in group:
                needed |= ancestors(node)
            found.append(sum(self.macs[node] for node in needed))
        return tuple(found)

    def of(self, nodes: Iterable[Node]) -> int:
        return sum(self.macs[node] for node in nodes)

    def after(self, node: Node, program: Program) -> int:
        """Of what the outputs take besides."""
        (output,) = program.graph_module.graph.find_nodes(op="output")
        return self.of_parts([output.args[0]])[0] - self.until(node)

    def between(self, first: Node, second: Node) -> int:
        return self.until(second) - self.until(first)


def head_after(program: Program, source: Node, cuts: Sequence[Node]) -> Head | None:
    """What the outputs are computed by from `source` on; None where one is not. `cuts` are cut points after it."""
    (output,) = program.graph_module.graph.find_nodes(op="output")
    reached: set[Node] = set()
    pending = [source]
    while pending:
        for user in pending.pop().users:
            if user.op != "output" and user not in reached:
                reached.add(user)
                pending.append(user)
    if not all(result in reached for result in output.args[0]):
        return None
    nodes = tuple(sorted(reached))
    products = [node for node in cuts if _weight_of(node) is not None]  # nothing goes around them
    pooled = [node for node in cuts if node.meta["val"].dim() == 2 and node.meta["val"].is_floating_point()]
    return Head(source, nodes, products[-1] if products else None, pooled[0] if pooled else None)


def _weight_of(node: Node) -> Node | None:
    """The weight that a product reads by itself."""
    weight = argument(node, WEIGHTS[node.target]) if node.target in WEIGHTS else None
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def _why_not(program: Program, head: Head, node: Node) -> str | None:
    """Why the head cannot read this value in place of the last one."""
    (output,) = program.graph_module.graph.find_nodes(op="output")
    here, last = node.meta["val"], head.source.meta["val"]
    if (here.dtype, here.dim()) != (last.dtype, last.dim()):
        return f"it is {here.dtype} with {here.dim()} axes, where the head reads {last.dtype} with {last.dim()}"
    try:
        with quiet():
            changed = changes_downstream(find_mode(program.graph_module), {head.source: here})
    except PropagationError as error:
        return f"the head does not take its value: {error}"
    for result in output.args[0]:
        if result in changed and value_key(changed[result])[::2] != value_key(result.meta["val"])[::2]:
            return f"the head would give {list(changed[result].shape)}, not {list(result.meta['val'].shape)}"
    return None


def _chosen(
    program: Program,
    chosen: str | tuple[int | str, ...],
    places: Places,
    fitting: Sequence[Node],
    refused: Mapping[Node, str],
) -> Places:
    assert isinstance(chosen, tuple)
    by_name = {node.name: node for node in program.graph_module.graph.nodes}
    exits, reasons = [], []
    for item in chosen:
        if isinstance(item, int):
            if not 0 <= item < len(places.exits):
                raise UsageError(f"there is no exit {item}: the program has {len(places.exits)} places, from 0")
            exits.append(places.exits[item])
        elif item not in by_name:
            raise UnknownNameError("node", item, by_name)
        elif by_name[item] in fitting:
            exits.append(by_name[item])
        else:
            reasons.append((by_name[item], refused.get(by_name[item], "it is no cut point ahead of the head")))
    return Places(places.head, tuple(sorted(set(exits))), tuple(reasons))
