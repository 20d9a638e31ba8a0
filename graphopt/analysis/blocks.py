"""Repeated blocks: consecutive pieces of a stream that compute the same up to their weights.

Found by structure alone: a stream is cut at its cut points, each piece is brought to canonical form, and the longest
repetitions in the sequence of forms are the blocks. Names of modules play no part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from torch.fx import Node

from graphopt.analysis.canonical import Form, call_key, canonical_form, leaf_key, same_order
from graphopt.analysis.cut_points import CutPoint, Flow, Stream
from graphopt.analysis.liveness import region_liveness
from graphopt.analysis.runs import find_runs
from graphopt.analysis.view import Kind
from graphopt.program import Program

Row = tuple[Node, ...]  # corresponding nodes, one of each block


@dataclass(frozen=True)
class Block:
    """A piece of a stream between two cut points; in a `Repeat` all tuples but `live_outs` correspond by position.

    - `input` is the cut point before it and `output`, one of its nodes, the cut point at its end: equal in type and
      sizes, and the next block's `input` is this one's `output`.
    - `nodes` are its calls in an order of execution, with those that make constants or prepare side inputs (a shifted
      window's mask, a cast) for this block alone. They need not lie together in the graph.
    - `weights` are attributes that it reads, perhaps shared with other blocks, and `side_inputs` other values from
      outside: masks, position tables, rotary sines, encoder states. Sizes are neither.
    - `live_outs` are its nodes that are read outside, `output` first. There is no other, except where outputs of the
      program that were not counted, new state, or a size are taken from inside: ask `is_closed`.
    - `cut_points` are those inside, in order; the last is `output`. `inner` are repeats within the block.
    """

    input: Node
    output: Node
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    side_inputs: tuple[Node, ...]
    live_outs: tuple[Node, ...]
    cut_points: tuple[Node, ...]
    inner: tuple[Repeat, ...]

    @property
    def is_closed(self) -> bool:
        """Whether `output` is all that the rest of the graph reads: the block can be dropped or moved as a whole."""
        return self.live_outs == (self.output,)


@dataclass(frozen=True)
class Repeat:
    """Two or more isomorphic blocks in a row; each reads at least one weight."""

    blocks: tuple[Block, ...]

    def counterparts(self, node: Node) -> tuple[Node, ...]:
        """What corresponds in each block to a node, weight, side input or main input of one of them; () for others."""
        return next((row for row in self.rows() if node in row), ())

    def rows(self) -> list[tuple[Node, ...]]:
        """All corresponding nodes: main inputs, then calls in order of execution, weights and side inputs."""
        columns = ((block.input, *block.nodes, *block.weights, *block.side_inputs) for block in self.blocks)
        return list(zip(*columns, strict=True))

    def shared_weights(self) -> tuple[Node, ...]:
        """Weights that all blocks read in the same place."""
        rows = zip(*(block.weights for block in self.blocks), strict=True)
        return tuple(row[0] for row in rows if len(set(row)) == 1)


def find_repeats(program: Program, path: str = "", outputs: Sequence[str] | None = None) -> tuple[Repeat, ...]:
    """Repeated blocks of the graph at `path`, in order of execution; no node is in two of them.

    All streams are searched, the main one first: both halves of an encoder-decoder, both towers of a pair. Of
    overlapping repetitions the one that covers most nodes counts; a repetition within one block is in its `inner`. A
    block has at most 1024 cut points; a first block whose input also goes around all of its followers, as in one skip
    over a whole tower, is not found. `outputs` is as in `cut_points`: those that paths are counted to. Raises
    UnknownNameError. Time is linear in the graph, up to a logarithm.
    """
    flow = Flow(program, path, outputs)
    found: list[Repeat] = []
    taken: set[Node] = set()
    for stream in flow.streams():
        for repeat in _stream_repeats(flow.kinds, stream, taken):
            found.append(repeat)
            taken.update(node for block in repeat.blocks for node in block.nodes)
    return tuple(sorted(found, key=lambda repeat: repeat.blocks[0].output))


def _stream_repeats(kinds: Mapping[Node, Kind], stream: Stream, taken: set[Node]) -> list[Repeat]:
    if len(stream.path) < 3 or stream.path[0] in taken:
        return []
    start = stream.path[0]
    cuts = takewhile(lambda cut: cut.node not in taken, stream.cut_points())
    return _repeats(kinds, start, [cut for cut in cuts if cut.node is not start])


def _repeats(kinds: Mapping[Node, Kind], start: Node, cuts: Sequence[CutPoint]) -> list[Repeat]:
    """Repeats among consecutive cut points, `start` being the one before the first."""
    before = [start, *(cut.node for cut in cuts)]
    numbers: dict[Hashable, int] = {}
    letters = []
    for previous, cut in zip(before, cuts, strict=False):
        form = canonical_form(kinds, previous, set(cut.segment), cut.node)
        letters.append(numbers.setdefault(form.key, len(numbers)))
    found = []
    for run in find_runs(letters, [len(cut.segment) for cut in cuts]):
        pieces = [_Piece(before[word.start], tuple(cuts[word.start : word.stop])) for word in run.words()]
        forms = [piece.form(kinds) for piece in pieces]
        for _, group in groupby(range(len(pieces)), key=lambda index: forms[index].key):
            members = list(group)
            if len(members) > 1:
                found.append(_repeat(kinds, [pieces[i] for i in members], [forms[i] for i in members]))
    return [repeat for repeat in found if repeat.blocks[0].weights]


@dataclass(frozen=True)
class _Piece:
    start: Node
    cuts: tuple[CutPoint, ...]

    def form(self, kinds: Mapping[Node, Kind]) -> Form:
        region = {node for cut in self.cuts for node in cut.segment}
        return canonical_form(kinds, self.start, region, self.cuts[-1].node)


def _repeat(kinds: Mapping[Node, Kind], pieces: Sequence[_Piece], forms: Sequence[Form]) -> Repeat:
    inside, outside = _grow(kinds, [piece.start for piece in pieces], forms)
    weights = [row for row in outside if kinds[row[0]] == "weight"]
    side = [row for row in outside if kinds[row[0]] != "weight"]
    blocks = []
    for index, piece in enumerate(pieces):
        nodes, output = _column(inside, index), piece.cuts[-1].node
        others = (node for node in region_liveness(kinds, nodes).live_outs if node is not output)
        blocks.append(
            Block(
                piece.start,
                output,
                nodes,
                _column(weights, index),
                _column(side, index),
                (output, *others),
                tuple(cut.node for cut in piece.cuts),
                tuple(_repeats(kinds, piece.start, piece.cuts)),
            )
        )
    return Repeat(tuple(blocks))


def _column(rows: Sequence[Row], index: int) -> tuple[Node, ...]:
    return tuple(row[index] for row in rows)


def _grow(kinds: Mapping[Node, Kind], starts: Sequence[Node], forms: Sequence[Form]) -> tuple[list[Row], list[Row]]:
    """Rows of nodes inside and rows of values outside, after taking in what is computed for one block alone.

    A row of side values moves inside when each is read by its own block only and all are the same call of arguments
    that correspond; its arguments are then looked at in turn.
    """
    size = len(forms[0].nodes)
    rows = same_order(forms)
    inside = [set(form.nodes) for form in forms]
    number = [{node: position for position, node in enumerate(column)} for column in zip(*rows, strict=True)]
    for positions, start in zip(number, starts, strict=True):
        positions[start] = -1
    outside = dict(enumerate(rows[size:], size))
    grown: list[Row] = []
    pending = deque(outside)
    while pending:
        position = pending.popleft()
        row = outside.get(position)
        if row is None or not all(_belongs(kinds, node, nodes) for node, nodes in zip(row, inside, strict=True)):
            continue
        arguments = _same_call(kinds, row, number)
        if arguments is None:
            continue
        grown.append(outside.pop(position))
        for node, nodes in zip(row, inside, strict=True):
            nodes.add(node)
        for argument in arguments:
            known = number[0].get(argument[0])
            if known is None:
                known = len(number[0])
                outside[known] = argument
                for node, positions in zip(argument, number, strict=True):
                    positions[node] = known
            pending.append(known)
    return sorted([*rows[:size], *grown]), list(outside.values())


def _belongs(kinds: Mapping[Node, Kind], node: Node, block: set[Node]) -> bool:
    return kinds[node] in ("data", "constant") and all(user in block for user in node.users)


def _same_call(kinds: Mapping[Node, Kind], row: Row, number: Sequence[Mapping[Node, int]]) -> list[Row] | None:
    """The corresponding arguments of the calls in a row, each once; None where the calls differ."""
    columns, keys = [], []
    for node, positions in zip(row, number, strict=True):
        key, column = _numbered_call(kinds, node, positions)
        keys.append(key)
        columns.append(column)
    return list(zip(*columns, strict=True)) if len(set(keys)) == 1 else None


def _numbered_call(kinds: Mapping[Node, Kind], node: Node, number: Mapping[Node, int]) -> tuple[Hashable, Row]:
    order: dict[Node, int] = {}

    def place(argument: Node) -> Hashable:
        position = order.setdefault(argument, len(order))
        return position, number.get(argument), leaf_key(kinds, argument)

    return call_key(kinds, node, place), tuple(order)
