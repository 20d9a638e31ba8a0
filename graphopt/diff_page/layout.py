"""Where nodes stand: rows that both sides share, and lanes in which the lines between the nodes of one side run.

A node that both have stands at one height on both sides, and what leads to it right above, however much that is. The
lines are drawn as `git log --graph` draws them: a value keeps its lane from the node that computes it to the last
that reads it. Linear in nodes and edges but for a sort.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from graphopt.diff_page.diff import Diff, DiffNode

LANES = 10  # a value that finds none of them free has no line until it is looked at


@dataclass(frozen=True)
class Row:
    """Places in `Diff.a` and `Diff.b`; None where a side has nothing."""

    a: int | None
    b: int | None


@dataclass(frozen=True)
class Section:
    """A graph: rows from `start` to `end`, the latter not included."""

    graph: str
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """`lanes_a` and `lanes_b` give the lane of each node; None where all are taken."""

    rows: tuple[Row, ...]
    sections: tuple[Section, ...]
    lanes_a: tuple[int | None, ...]
    lanes_b: tuple[int | None, ...]


def lay_out(diff: Diff) -> Layout:
    """Deterministic: the same diff has the same layout."""
    rows: list[Row] = []
    sections = []
    for graph in dict.fromkeys(node.graph for node in (*diff.a, *diff.b)):
        start = len(rows)
        a, b = _reading_order(diff.a, graph), _reading_order(diff.b, graph)
        rows += _merge(a, b, _matches(diff, a, b))
        sections.append(Section(graph, start, len(rows)))
    lanes_a = _lanes(diff.a, [row.a for row in rows])
    lanes_b = _lanes(diff.b, [row.b for row in rows])
    return Layout(tuple(rows), tuple(sections), lanes_a, lanes_b)


def _reading_order(nodes: Sequence[DiffNode], graph: str) -> list[int]:
    """The order of execution, but weights and sub-graphs right before the first node that reads them."""
    members = [index for index, node in enumerate(nodes) if node.graph == graph]
    read = {index for index in members if nodes[index].description.kind in ("weight", "sub-graph")}
    place = {nodes[index].name: index for index in members}
    order: list[int] = []
    for index in members:
        if index in read:
            continue
        for name in nodes[index].inputs:
            if (source := place.get(name)) in read:
                read.remove(source)
                order.append(source)
        order.append(index)
    return [*sorted(read), *order]


def _matches(diff: Diff, a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions in `a` and `b` that belong at one height, rising in both: the same nodes first of all."""
    position = {diff.a[index].name: at for at, index in enumerate(a)}
    same: list[tuple[int, int]] = []
    replaced: list[tuple[int, int]] = []
    for at, index in enumerate(b):
        node = diff.b[index]
        if (node.state == "same" or node.differences) and node.partners[0] in position:
            same.append((position[node.partners[0]], at))
        else:
            candidates = [position[name] for name in node.partners if name in position]
            alike = [to for to in candidates if diff.a[a[to]].description.operator == node.description.operator]
            if alike:
                replaced.append((alike[0], at))
    return _fit(_rising(same), replaced)


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of `pairs`, which rise in the second number, that rises in the first too."""
    tails: list[int] = []
    last: list[int] = []
    previous: list[int] = []
    for number, (left, _) in enumerate(pairs):
        length = bisect_left(tails, left)
        previous.append(last[length - 1] if length else -1)
        if length == len(tails):
            tails.append(left)
            last.append(number)
        else:
            tails[length], last[length] = left, number
    chosen = []
    number = last[-1] if last else -1
    while number >= 0:
        chosen.append(pairs[number])
        number = previous[number]
    return chosen[::-1]


def _fit(anchors: list[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`anchors` and those of `others`, in their order, that rise with what stands around them."""
    result: list[tuple[int, int]] = []
    waiting = iter([*anchors, (1 << 60, 1 << 60)])
    following = next(waiting)
    for left, right in others:
        while following[1] < right:
            result.append(following)
            following = next(waiting)
        if (not result or result[-1][0] < left) and left < following[0]:
            result.append((left, right))
    return [*result, following, *waiting][:-1]


def _merge(a: Sequence[int], b: Sequence[int], matches: Sequence[tuple[int, int]]) -> list[Row]:
    rows: list[Row] = []
    at, bt = 0, 0
    for left, right in [*matches, (len(a), len(b))]:
        only_a, only_b = a[at:left], b[bt:right]
        height = max(len(only_a), len(only_b))
        padded_a = [*[None] * (height - len(only_a)), *only_a]
        padded_b = [*[None] * (height - len(only_b)), *only_b]
        rows += [Row(x, y) for x, y in zip(padded_a, padded_b, strict=True)]
        if left < len(a):
            rows.append(Row(a[left], b[right]))
        at, bt = left + 1, right + 1
    return rows


def _lanes(nodes: Sequence[DiffNode], shown: Sequence[int | None]) -> tuple[int | None, ...]:
    """The lowest lane that is free at the node's row; it is free again in the row of the last reader."""
    row = {nodes[index].name: at for at, index in enumerate(shown) if index is not None}
    last = _last_rows(nodes, row)
    free = list(range(LANES))
    busy: list[tuple[int, int]] = []
    lanes: list[int | None] = [None] * len(nodes)
    for at, index in enumerate(shown):
        while busy and busy[0][0] <= at:
            heappush(free, heappop(busy)[1])
        if index is not None and free:
            lanes[index] = heappop(free)
            heappush(busy, (last.get(nodes[index].name, at + 1), lanes[index] or 0))
    return tuple(lanes)


def _last_rows(nodes: Sequence[DiffNode], row: Mapping[str, int]) -> dict[str, int]:
    last: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            last[name] = max(last.get(name, 0), row[node.name])
    return last
