"""Streams of a graph and their cut points: values that every path from a stream's source to the outputs runs through.

In the residual stream of a network these are the sums (and what follows them before the stream forks again). Every
stream is a path of the post-dominator tree over data. Weights and constants are no paths. A second input, such as an
attention mask, that goes around a cut point does not hide it: it starts a stream of its own, and what it brings in is
reported as a side input of the place where it enters. So does a condition (a boolean tensor) computed from values that
also flow on without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from graphopt.analysis.liveness import ancestors, region_liveness
from graphopt.analysis.post_dominators import PostDominatorTree
from graphopt.analysis.view import Kind, node_kinds, read_contents, tensors
from graphopt.errors import UnknownNameError
from graphopt.program import Program

Rank = tuple[bool, int, int]


@dataclass(frozen=True)
class CutPoint:
    """A value that its whole stream runs through.

    `segment` is what is computed between the cut point before and this one, in order of execution; the last node is
    the cut point. No node of it but the last is read by data outside, save for outputs that are not counted.
    `side_inputs` are other values that the segment reads: neither weights nor sizes.
    """

    node: Node
    segment: tuple[Node, ...]
    side_inputs: tuple[Node, ...]


@dataclass(frozen=True)
class Stream:
    """Consecutive cut points by their nodes, in order of execution; the first is where the stream starts.

    `join` is the cut point of a larger stream that this one runs into, None where it reaches the outputs by itself.
    """

    path: tuple[Node, ...]
    join: Node | None
    _flow: Flow

    def cut_points(self) -> Iterator[CutPoint]:
        """In order, without the first when it is an input; time is linear in the nodes of the segments.

        The join is among them where the segment before it is no larger than the largest: that of a mask, which is all
        that comes after it, is not.
        """
        largest, before = 1, None
        for node in self.path:
            if before is not None or node.op != "placeholder":
                cut = self._flow.cut_point(before, node)
                largest = max(largest, len(cut.segment))
                yield cut
            before = node
        if self.join and before and self._flow.distance(before, self.join, largest) <= largest:
            yield self._flow.cut_point(before, self.join)


def cut_points(program: Program, path: str = "", outputs: Sequence[str] | None = None) -> tuple[CutPoint, ...]:
    """The cut points of the main stream of the graph at `path`, in order of execution.

    Every path from where it starts to the outputs runs through every one of them. It starts at an input; or where
    something else computed from this input goes around (ids that a mask is made of), at the first floating-point
    value, which then is the first cut point. Of several inputs it is the one that leaves the least weights in one piece
    or aside. `outputs` names those to count (in the main graph; default all): a model that also returns what its blocks
    compute inside, such as keys and values, has cut points for its other outputs only. New state is never counted.
    Raises UnknownNameError.
    """
    stream = next(iter(Flow(program, path, outputs).streams()), None)
    return tuple(stream.cut_points()) if stream else ()


def crossing(kinds: Mapping[Node, Kind], cut: Node) -> tuple[Node, ...]:
    """What else is alive at a cut point: values that are computed for it and read again after it.

    A mask or a table computed once and read by all blocks is here: whoever takes the graph apart at the cut hands these
    over with it. Inputs and weights are not among them.
    """
    return tuple(node for node in region_liveness(kinds, ancestors(cut)).live_outs if node is not cut)


class Flow:
    """The data of one graph: which values reach the outputs, and by which tree of post-dominators."""

    def __init__(self, program: Program, path: str = "", outputs: Sequence[str] | None = None) -> None:
        self.kinds = node_kinds(program, path)
        self._ends = _counted(program, path, outputs, self.kinds)
        self._state = {item.spec.name for item in program.state} if not path else set()
        reached = self._reaching(through_conditions=True)
        self._nodes = [node for node in self.kinds if node in reached]
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._successors = self._find_successors()

    def _reaching(self, through_conditions: bool) -> set[Node]:
        found: set[Node] = set()
        pending = [node for node in self._ends if self.kinds[node] in ("input", "data")]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                if through_conditions or not _is_condition(node):
                    pending.extend(a for a in read_contents(node) if self.kinds[a] in ("input", "data"))
        return found

    def _find_successors(self) -> list[list[int]]:
        """Who reads each node; what makes a condition only, where the node has no other way to the outputs."""
        unconditional = self._reaching(through_conditions=False)
        successors: list[list[int]] = [[] for _ in self._nodes]
        for index, node in enumerate(self._nodes):
            aside = unconditional if _is_condition(node) or node not in unconditional else ()
            for argument in read_contents(node):
                if argument in self._index and argument not in aside:
                    successors[self._index[argument]].append(index)
        for node in self._ends:
            if node in self._index:
                successors[self._index[node]].append(len(self._nodes))
        return successors

    def streams(self) -> list[Stream]:
        """All of them, each value in one; the main stream is the first, the others follow by the same measure."""
        return [stream for _, stream in sorted(self._ranked_streams(), key=lambda item: item[0], reverse=True)]

    def _ranked_streams(self) -> Iterator[tuple[Rank, Stream]]:
        tree, end = self._tree, len(self._nodes)
        best = self._rank()
        above = [(False, -1, 0)] * (end + 1)  # the best rank of the nodes that the tree has over each
        chosen = [-1] * (end + 1)
        for node in range(end):
            best[node] = max(best[node], above[node])
            parent = tree.parent[node]
            if best[node] > above[parent]:
                above[parent], chosen[parent] = best[node], node
        for node in range(end):
            parent = tree.parent[node]
            if chosen[parent] != node or parent == end:
                found = [node]
                while (above_it := chosen[found[-1]]) >= 0:
                    found.append(above_it)
                join = None if parent == end else self._nodes[parent]
                yield best[node], Stream(tuple(self._nodes[index] for index in reversed(found)), join, self)

    @cached_property
    def _tree(self) -> PostDominatorTree:
        return PostDominatorTree(self._successors)

    def _rank(self) -> list[Rank]:
        """How good a stream is that starts at each node: the weights on it less those of its largest piece.

        A mask has few weights ahead of it; ids that also make the mask have all of them in one piece. What starts
        inside a piece, or at state, comes after what starts before it: origins are inputs, conditions, and the first
        floating-point values.
        """
        tree, end = self._tree, len(self._nodes)
        ahead, own, origins = self._weights_ahead(), set(self._readers), self._origins()
        largest = [0] * (end + 1)
        rank = [(False, 0, 0)] * (end + 1)
        for node in range(end - 1, -1, -1):
            parent = tree.parent[node]
            largest[node] = max(largest[parent], ahead[node] - ahead[parent])
            rank[node] = (node in origins, ahead[node] + (node in own) - largest[node], -node)
        return rank

    def _origins(self) -> set[int]:
        floating = [_is_floating(node) for node in self._nodes]
        inner = [False] * (len(self._nodes) + 1)  # has a predecessor, which for floating values must be floating
        for node, successors in enumerate(self._successors):
            for successor in successors:
                if successor < len(floating) and (floating[node] or not floating[successor]):
                    inner[successor] = True
        return {i for i, node in enumerate(self._nodes) if not inner[i] and node.target not in self._state}

    def _weights_ahead(self) -> list[int]:
        """For each node how many others that read a weight it reaches."""
        end = len(self._nodes)
        bits = {node: 1 << position for position, node in enumerate(self._readers)}
        waiting = [0] * (end + 1)  # predecessors yet to come: sets that nobody reads again are dropped
        for successors in self._successors:
            for successor in successors:
                waiting[successor] += 1
        reached: dict[int, int] = {end: 0}
        counts = [0] * (end + 1)
        for node in range(end - 1, -1, -1):
            found = 0
            for successor in self._successors[node]:
                found |= reached[successor]
                waiting[successor] -= 1
                if not waiting[successor]:
                    del reached[successor]
            reached[node] = found | bits.get(node, 0)
            counts[node] = found.bit_count()
        return counts

    @cached_property
    def _readers(self) -> Sequence[int]:
        """Positions of the nodes that read a weight; all nodes where there are no weights."""
        weighted: set[Node] = set()
        for node, kind in self.kinds.items():
            derived = kind == "constant" and any(argument in weighted for argument in node.all_input_nodes)
            if derived or (kind == "weight" and _may_be_trained(node)):
                weighted.add(node)
        readers = (any(argument in weighted for argument in node.all_input_nodes) for node in self._nodes)
        return [index for index, reads in enumerate(readers) if reads] or range(len(self._nodes))

    def cut_point(self, before: Node | None, node: Node) -> CutPoint:
        """The cut point `node` after `before`, its immediate neighbour on a stream."""
        inside = {node} if before is None else self._between(before, node)
        border = region_liveness(self.kinds, inside)
        side = tuple(value for value in border.inputs if value is not before)
        return CutPoint(node, tuple(sorted(inside)), side)

    def _between(self, start: Node, end: Node, limit: int = sys.maxsize) -> set[Node]:
        found = {end}
        pending = [self._index[start]]
        last = self._index[end]
        while pending and len(found) <= limit:
            for successor in self._successors[pending.pop()]:
                if successor != last and (node := self._nodes[successor]) not in found:
                    found.add(node)
                    pending.append(successor)
        return found

    def distance(self, start: Node, end: Node, limit: int) -> int:
        """How many nodes are computed between a node and the next of its stream; any number above `limit` if more."""
        return len(self._between(start, end, limit))


def _counted(program: Program, path: str, outputs: Sequence[str] | None, kinds: Mapping[Node, Kind]) -> list[Node]:
    (output,) = (node for node, kind in kinds.items() if kind == "output")
    results = list(output.all_input_nodes) if path else list(output.args[0])  # type: ignore[arg-type]
    names = [spec.name for spec in program.outputs]
    if path or outputs is None:
        return results if path else results[: len(names)]
    for name in outputs:
        if name not in names:
            raise UnknownNameError("output", name, names)
    return [results[names.index(name)] for name in outputs]


def _may_be_trained(weight: Node) -> bool:
    value = weight.meta.get("val")
    return _is_floating(weight) or (isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8))


def _is_condition(node: Node) -> bool:
    return any(leaf.dtype == torch.bool for leaf in tensors(node))


def _is_floating(node: Node) -> bool:
    return any(leaf.is_floating_point() for leaf in tensors(node))
