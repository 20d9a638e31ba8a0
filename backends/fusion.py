"""Which element-wise nodes are computed in the kernel of the node before them, decided on the torch graph.

A node inside may see the kernel's result with its axes permuted, as an image network sees feature maps that are stored
channels last; the kernel goes on in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from graphopt.backends.sizes import Shape, Size, product, shape_of

_LONGEST = 48  # nodes of one epilogue


@dataclass(frozen=True)
class Kinds:
    """What fusion asks of a node: element-wise at the same rows and columns, branching, a permutation of axes, a
    reshape, a repetition along axes of size 1."""

    element_wise: Callable[[Node], bool]
    branching: Callable[[Node], bool]
    permutation: Callable[[Node], tuple[int, ...]]
    reshape: Callable[[Node], bool]
    expansion: Callable[[Node], bool]


@dataclass(frozen=True)
class Place:
    """Axis n of a node is axis order[n] of `shape`, the shape in the kernel's order; no order means the same axes.

    `joins`: the kernel knows its elements by all their axes, so that the last two may be made one.
    """

    shape: Shape
    order: tuple[int, ...] = ()
    joins: bool = False

    def permuted(self, order: tuple[int, ...]) -> Place:
        outer = self.order or tuple(range(len(self.shape)))
        composed = tuple(outer[axis] for axis in order)
        return replace(self, order=() if composed == tuple(range(len(composed))) else composed)


def in_order(graph: Graph, waits: Callable[[Node], bool], kinds: Kinds) -> list[Node]:
    """All nodes in an order of execution in which those that wait stand right before their first reader.

    So do permutations and reshapes of them. A kernel computes with what is there before it: behind an attention it can
    read a gate that the graph has between the two. Constants therefore come first.
    """
    order: list[Node] = []
    waiting: set[Node] = set()

    def add(node: Node) -> None:
        for source in node.all_input_nodes:
            if source in waiting:
                waiting.remove(source)
                add(source)
        order.append(node)

    for node in sorted(graph.nodes, key=lambda node: node.op != "get_attr"):
        rearranges = bool(kinds.permutation(node)) or kinds.reshape(node)
        if node.users and (waits(node) or (rearranges and node.args[0] in waiting)):
            waiting.add(node)
        else:
            add(node)
    return order


def epilogue(
    anchor: Node,
    start: Place,
    order: Mapping[Node, int],
    kinds: Kinds,
    ends: Callable[[Node], bool] = lambda node: True,
) -> tuple[list[Node], Place]:
    """The longest run of element-wise nodes that ends in one result and reads, besides `anchor`, only earlier nodes.

    Each has the anchor's rows and columns, so its element at a position needs the anchor's element at the same
    position. Inside the run a node may have several users, as x has in 0.5 x (1 + tanh(x + x^3)). At most one of them
    is branching: nested comparisons take TVM's simplifier too long. `start` is where the anchor's own result lies;
    returned with the run is where its last node lies, which is one of those where the kernel may end.
    """
    places = {anchor: start}

    def fits(node: Node) -> bool:
        place = _place(node, places, kinds)
        if place is None or sum(map(kinds.branching, (*places, node))) > 1:
            return False
        places[node] = place
        return True

    run = _longest(anchor, order, fits, ends)
    return run, places[run[-1] if run else anchor]


def row_epilogue(anchor: Node, wide: Shape, order: Mapping[Node, int], kinds: Kinds) -> list[Node]:
    """The longest run after a reduction of the last axis of `wide` that ends in one result of shape `wide`.

    A node inside has one float a row, with the last axis kept at size 1 or dropped, or a whole row. It reads, besides
    `anchor`, only earlier nodes. One of those that have a whole row may be branching.
    """
    kept, dropped = (*wide[:-1], 1), wide[:-1]
    if kept == wide:
        return []
    below = {dropped: {dropped}, kept: {kept}, wide: {kept, wide}}
    shapes = {anchor: shape_of(anchor.meta["val"])}

    def fits(node: Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return False
        shape = shape_of(value)
        read = {shapes[source] for source in node.all_input_nodes if source in shapes}
        if kinds.expansion(node):
            possible = shape == wide and node.args[0] in shapes and read == {kept}
        elif kinds.element_wise(node):
            possible = read <= below.get(shape, set())
        else:
            possible = kinds.reshape(node) and shape == kept and read == {dropped}
        if shape == wide:
            whole = [other for other in shapes if shapes[other] == wide]
            possible = possible and sum(map(kinds.branching, (*whole, node))) <= 1
        else:
            possible = possible and value.is_floating_point()
        if possible:
            shapes[node] = shape
        return possible

    return _longest(anchor, order, fits, lambda node: shapes[node] == wide and not kinds.expansion(node))


def _longest(
    anchor: Node, order: Mapping[Node, int], fits: Callable[[Node], bool], ends: Callable[[Node], bool]
) -> list[Node]:
    """The longest run after `anchor` of nodes that fit, read only it and what is before it, and leave one result."""
    region, best = [anchor], 1
    while len(region) < _LONGEST:
        candidates = {user for node in region for user in node.users if user not in region}
        following = min(candidates, key=lambda node: order.get(node, len(order)), default=None)
        if following is None or following not in order:
            break
        if not all(source in region or order[source] < order[anchor] for source in following.all_input_nodes):
            break
        if not fits(following):
            break
        region.append(following)
        if _exits(region) == [following] and ends(following):
            best = len(region)
    return region[1:best]


def _place(node: Node, places: Mapping[Node, Place], kinds: Kinds) -> Place | None:
    """Where an element of the node lies; None where it needs other elements than its own."""
    value = node.meta.get("val")
    sources = [places[source] for source in node.all_input_nodes if source in places]
    if not isinstance(value, torch.Tensor):
        return None
    if permutation := kinds.permutation(node):
        return sources[0].permuted(permutation)
    shape, first = shape_of(value), sources[0]
    if first.joins and not first.order and kinds.reshape(node) and shape == _joined(first.shape):
        return Place(shape)
    if not kinds.element_wise(node) or any(source.order != first.order for source in sources):
        return None
    if not first.order:
        return replace(first, shape=shape) if _rows(shape) == _rows(first.shape) else None
    fits = len(shape) == len(first.order) and all(
        size == first.shape[a] for size, a in zip(shape, first.order, strict=True)
    )
    return first if fits else None


def _joined(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-2] * shape[-1]) if len(shape) > 1 else ()


def _rows(shape: Shape) -> tuple[Size, Size]:
    return product(shape[:-1]), shape[-1] if shape else 1


def _exits(region: list[Node]) -> list[Node]:
    return [node for node in region if any(user not in region for user in node.users) or not node.users]
