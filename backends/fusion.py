"""Which element-wise nodes are computed in the kernel of the node before them, decided on the torch graph.

A node inside may see the kernel's result with its axes permuted, as an image network sees feature maps that are stored
channels last; the kernel goes on in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphopt.backends.sizes import Shape, Size, product, shape_of

_LONGEST = 48  # nodes of one epilogue


@dataclass(frozen=True)
class Kinds:
    """What fusion asks of a node: element-wise at the same rows and columns, branching, a permutation of axes."""

    element_wise: Callable[[Node], bool]
    branching: Callable[[Node], bool]
    permutation: Callable[[Node], tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Axis n of a node is axis order[n] of `shape`, the shape in the kernel's order; no order means the same axes."""

    shape: Shape
    order: tuple[int, ...] = ()

    def permuted(self, order: tuple[int, ...]) -> Place:
        outer = self.order or tuple(range(len(self.shape)))
        composed = tuple(outer[axis] for axis in order)
        return Place(self.shape, () if composed == tuple(range(len(composed))) else composed)


def epilogue(anchor: Node, start: Place, order: Mapping[Node, int], kinds: Kinds) -> tuple[list[Node], Place]:
    """The longest run of element-wise nodes that ends in one result and reads, besides `anchor`, only earlier nodes.

    Each has the anchor's rows and columns, so its element at a position needs the anchor's element at the same
    position. Inside the run a node may have several users, as x has in 0.5 x (1 + tanh(x + x^3)). At most one of them
    is branching: nested comparisons take TVM's simplifier too long. `start` is where the anchor's own result lies;
    returned with the run is where its last node lies.
    """
    region, places, best = [anchor], {anchor: start}, 1
    while len(region) < _LONGEST:
        candidates = {user for node in region for user in node.users if user not in places}
        following = min(candidates, key=lambda node: order.get(node, len(order)), default=None)
        if following is None or following not in order:
            break
        if not all(source in places or order[source] < order[anchor] for source in following.all_input_nodes):
            break
        place = _place(following, places, kinds)
        if place is None or sum(map(kinds.branching, (*region, following))) > 1:
            break
        region.append(following)
        places[following] = place
        if _exits(region, places) == [following]:
            best = len(region)
    return region[1:best], places[region[best - 1]]


def _place(node: Node, places: Mapping[Node, Place], kinds: Kinds) -> Place | None:
    """Where an element of the node lies; None where it needs other elements than its own."""
    value = node.meta.get("val")
    sources = [places[source] for source in node.all_input_nodes if source in places]
    if not isinstance(value, torch.Tensor):
        return None
    if permutation := kinds.permutation(node):
        return sources[0].permuted(permutation)
    shape, first = shape_of(value), sources[0]
    if not kinds.element_wise(node) or any(source.order != first.order for source in sources):
        return None
    if not first.order:
        return Place(shape) if _rows(shape) == _rows(first.shape) else None
    fits = len(shape) == len(first.order) and all(
        size == first.shape[a] for size, a in zip(shape, first.order, strict=True)
    )
    return first if fits else None


def _rows(shape: Shape) -> tuple[Size, Size]:
    return product(shape[:-1]), shape[-1] if shape else 1


def _exits(region: list[Node], inside: Mapping[Node, Place]) -> list[Node]:
    return [node for node in region if any(user not in inside for user in node.users) or not node.users]
