from __future__ import annotations

from itertools import pairwise

import pytest

from graphopt import Program, optimize
from graphopt.diff_page.diff import DiffNode, align
from graphopt.diff_page.layout import LANES, Layout, lay_out
from tests.diff_page.graphs import chain
from tests.models import program


def of(name: str) -> tuple[Program, Program]:
    return program(name), optimize(program(name), "O2", verify="off").program


@pytest.mark.parametrize("name", ["bert", "resnet", "branching"])
def test_every_node_has_one_row_and_equal_ones_share_it(name: str) -> None:
    diff = align(*of(name))
    layout = lay_out(diff)
    assert sorted(row.a for row in layout.rows if row.a is not None) == list(range(len(diff.a)))
    assert sorted(row.b for row in layout.rows if row.b is not None) == list(range(len(diff.b)))
    together = {diff.a[row.a].name for row in layout.rows if row.a is not None and row.b is not None}
    assert {node.name for node in diff.b if node.state == "same"} <= together
    assert layout == lay_out(align(*of(name)))


def test_a_replacement_stands_beside_what_it_replaces() -> None:
    diff = align(chain(5), chain(5, replaced=[2]))
    assert [(row.a, row.b) for row in lay_out(diff).rows] == [(number, number) for number in range(7)]


def test_what_comes_before_a_match_stands_right_above_it() -> None:
    diff = align(chain(5), chain(5, removed=[1, 2]))
    assert [row.b for row in lay_out(diff).rows] == [0, 1, None, None, 2, 3, 4]


def test_nodes_in_another_order_are_all_there() -> None:
    a, b = chain(6), chain(6)
    nodes = {node.name: node for node in b.graph_module.graph.nodes}
    nodes["step_5"].prepend(nodes["step_1"])
    layout = lay_out(align(a, b))
    assert sum(row.a is not None and row.b is not None for row in layout.rows) == 7
    assert len(layout.rows) == 9


def test_weights_stand_before_their_first_reader() -> None:
    diff = align(program("mlp"), program("mlp"))
    names = [diff.a[row.a].name for row in lay_out(diff).rows if row.a is not None]
    place = names.index("linear")
    assert set(names[place - 2 : place]) == {"first_weight", "first_bias"}


def test_each_graph_is_a_section() -> None:
    sections = lay_out(align(program("branching"), program("branching"))).sections
    assert [section.graph for section in sections] == ["", "true_graph_0", "false_graph_0"]
    assert [section.start for section in sections[1:]] == [section.end for section in sections[:-1]]


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
def test_a_lane_holds_one_value_at_a_time(name: str) -> None:
    diff = align(program(name), program(name))
    layout = lay_out(diff)
    rows = {diff.a[row.a].name: at for at, row in enumerate(layout.rows) if row.a is not None}
    spans: dict[int, list[tuple[int, int]]] = {}
    for node, lane in zip(diff.a, layout.lanes_a, strict=True):
        if lane is not None:
            spans.setdefault(lane, []).append((rows[node.name], last_row(diff.a, node, rows)))
    assert max(spans) < LANES
    for held in spans.values():
        held.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(held))


def last_row(nodes: tuple[DiffNode, ...], node: DiffNode, rows: dict[str, int]) -> int:
    return max((rows[reader.name] for reader in nodes if node.name in reader.inputs), default=rows[node.name])


def test_a_chain_needs_one_lane() -> None:
    layout: Layout = lay_out(align(chain(3), chain(3)))
    assert layout.lanes_a == (0, 0, 0, 0, 0)
