"""Streams of a graph and their cut points: values that every path from a stream's source to the outputs runs through.

In the residual stream of a network these are the sums (and what follows them before the stream forks again). Every
stream is a path of the post-dominator tree over data. Weights and constants are no paths. A second input, such as an
attention mask, that goes around a cut point does not hide it: it starts a stream of its own, and what it brings in is
reported as a side input of the place where it enters.
"""

from __future__ import annotations

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
    """Consecutive cut points by their nodes, in order of execution; the first is where the stream starts."""

    path: tuple[Node, ...]
    _flow: Flow

    def cut_points(self) -> Iterator[CutPoint]:
        """In order, without the first when it is an input; time is linear in the nodes of the segments."""
        before = None
        for node in self.path:
            if before is not None or node.op != "placeholder":
                yield self._flow.cut_point(before, node)
            before = node


def cut_points(program: Program, path: str = "", outputs: Sequence[str] | None = None) -> tuple[CutPoint, ...]:
    """The cut points of the main stream of the graph at `path`, in order of execution.

    The main stream is the one that is cut into the smallest pieces: it leaves the least weights between two cut points
    or aside. Where it starts at an input every path from this input to the outputs runs through every cut point; where
    the input itself goes around (ids that a mask is computed from) it starts at the first value after, and this value
    is the first cut point. `outputs` names those to count (in the main graph; default all): a model that also
    returns what its blocks compute inside, such as keys and values, has cut points for its other outputs only. New
    state is never counted. Raises UnknownNameError.
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
        reached = _reaching(self._ends, self.kinds)
        self._nodes = [node for node, kind in self.kinds.items() if node in reached and kind in ("input", "data")]
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._successors = self._find_successors()

    def _find_successors(self) -> list[list[int]]:
        successors: list[list[int]] = [[] for _ in self._nodes]
        for index, node in enumerate(self._nodes):
            for argument in read_contents(node):
                if argument in self._index:
                    successors[self._index[argument]].append(index)
        for node in self._ends:
            if node in self._index:
                successors[self._index[node]].append(len(self._nodes))
        return successors

    def streams(self) -> list[Stream]:
        """All of them, each value in one; the main stream is the first, the others follow by the same measure."""
        paths = sorted(self._paths(), key=lambda item: item[0], reverse=True)
        return [Stream(path, self) for _, path in paths]

    def _paths(self) -> Iterator[tuple[tuple[int, int], tuple[Node, ...]]]:
        tree, end = self._tree, len(self._nodes)
        best = self._rank()
        above = [(-1, 0)] * (end + 1)  # the best rank of the nodes that the tree has over each
        chosen = [-1] * (end + 1)
        for node in range(end):
            best[node] = max(best[node], above[node])
            parent = tree.parent[node]
            if best[node] > above[parent]:
                above[parent], chosen[parent] = best[node], node
        for node in range(end):
            if chosen[tree.parent[node]] != node or tree.parent[node] == end:
                found = [node]
                while (node := chosen[node]) >= 0:
                    found.append(node)
                yield best[found[0]], tuple(self._nodes[index] for index in reversed(found))

    @cached_property
    def _tree(self) -> PostDominatorTree:
        return PostDominatorTree(self._successors)

    def _rank(self) -> list[tuple[int, int]]:
        """How good a stream is that starts at each node: the weights on it less those of its largest piece.

        A mask has few weights ahead of it; ids that also make the mask have all of them in one piece. Between a piece
        and its inside the piece is right: inputs, and values that are the first to be floating, get half of all
        weights on top.
        """
        tree, end = self._tree, len(self._nodes)
        ahead, own = self._weights_ahead(), set(self._readers)
        bonus = max(ahead, default=0) // 2
        largest = [0] * (end + 1)
        rank = [(0, 0)] * (end + 1)
        for node in range(end - 1, -1, -1):
            parent = tree.parent[node]
            largest[node] = max(largest[parent], ahead[node] - ahead[parent])
            rank[node] = (ahead[node] + (node in own) - largest[node], -node)
        for node in self._origins():
            rank[node] = (rank[node][0] + bonus, -node)
        return rank

    def _origins(self) -> list[int]:
        floating: set[Node] = set()  # floating values and what is computed from them
        found = []
        for index, node in enumerate(self._nodes):
            derived = any(argument in floating for argument in node.all_input_nodes)
            if derived or _is_floating(node):
                floating.add(node)
            if node.op == "placeholder" or (not derived and node in floating):
                found.append(index)
        return found

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

    def _between(self, start: Node, end: Node) -> set[Node]:
        found = {end}
        pending = [self._index[start]]
        last = self._index[end]
        while pending:
            for successor in self._successors[pending.pop()]:
                if successor != last and (node := self._nodes[successor]) not in found:
                    found.add(node)
                    pending.append(successor)
        return found


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


def _reaching(ends: Sequence[Node], kinds: Mapping[Node, Kind]) -> set[Node]:
    found: set[Node] = set()
    pending = [node for node in ends if kinds[node] in ("input", "data")]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(a for a in read_contents(node) if kinds[a] in ("input", "data"))
    return found


def _may_be_trained(weight: Node) -> bool:
    value = weight.meta.get("val")
    return _is_floating(weight) or (isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8))


def _is_floating(node: Node) -> bool:
    return any(leaf.is_floating_point() for leaf in tensors(node))
