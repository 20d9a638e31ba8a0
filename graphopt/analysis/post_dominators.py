"""The tree of immediate post-dominators of an acyclic graph: what every path from a node to the end runs through.

One pass against the order of execution: the immediate post-dominator of a node is the lowest common ancestor of its
successors in the tree so far. Ancestors are found over jump pointers (Myers, "An applicative random-access stack",
1983), so a graph with n nodes and e edges takes O(n + e log n).
"""

from __future__ import annotations

from collections.abc import Sequence


class PostDominatorTree:
    """Nodes are 0 to n-1 in topological order, the end is n: `parent[i]` is i's immediate post-dominator."""

    def __init__(self, successors: Sequence[Sequence[int]]) -> None:
        """`successors[i]` holds numbers above i and is not empty: every node reaches the end."""
        end = len(successors)
        self.parent = [end] * (end + 1)
        self.depth = [0] * (end + 1)
        self._jump = [end] * (end + 1)
        for node in range(end - 1, -1, -1):
            first, *others = successors[node]
            for other in others:
                first = self.common_ancestor(first, other)
            self._insert(node, first)

    def _insert(self, node: int, parent: int) -> None:
        jump = self._jump[parent]
        even = self.depth[parent] - self.depth[jump] == self.depth[jump] - self.depth[self._jump[jump]]
        self.parent[node] = parent
        self.depth[node] = self.depth[parent] + 1
        self._jump[node] = self._jump[jump] if even else parent

    def common_ancestor(self, left: int, right: int) -> int:
        """The first node that both are or are followed by on every path."""
        if self.depth[left] < self.depth[right]:
            left, right = right, left
        while self.depth[left] > self.depth[right]:
            jump = self._jump[left]
            left = jump if self.depth[jump] >= self.depth[right] else self.parent[left]
        while left != right:
            if self._jump[left] != self._jump[right]:
                left, right = self._jump[left], self._jump[right]
            else:
                left, right = self.parent[left], self.parent[right]
        return left
