from __future__ import annotations

import random

import networkx
import pytest

from graphopt.analysis.post_dominators import PostDominatorTree


def _random_graph(size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    reach = generator.choice([2, 5, size])
    return [
        [min(size, node + generator.randint(1, reach)) for _ in range(generator.randint(1, 4))] for node in range(size)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_networkx(seed: int) -> None:
    size = 5 + seed * 3
    successors = _random_graph(size, seed)
    backwards = networkx.DiGraph((user, node) for node, users in enumerate(successors) for user in users)
    backwards.add_nodes_from(range(size + 1))
    expected = networkx.immediate_dominators(backwards, size)
    tree = PostDominatorTree(successors)
    assert {node: tree.parent[node] for node in range(size)} == {node: expected[node] for node in range(size)}
    assert all(tree.depth[node] == tree.depth[tree.parent[node]] + 1 for node in range(size))


def test_a_graph_without_nodes() -> None:
    assert PostDominatorTree([]).parent == [0]
