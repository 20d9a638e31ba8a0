"""Which element-wise nodes are computed in the kernel of the node before them, decided on the torch graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from graphopt.backends.sizes import Shape, Size, product, shape_of

_LONGEST = 48  # nodes of one epilogue


def epilogue(
    anchor: Node,
    order: Mapping[Node, int],
    element_wise: Callable[[Node], bool],
    branching: Callable[[Node], bool],
) -> list[Node]:
    """The longest run of element-wise nodes that ends in one result and reads, besides `anchor`, only earlier nodes.

    Each has the anchor's rows and columns, so its element at a position needs the anchor's element at the same
    position. Inside the run a node may have several users, as x has in 0.5 x (1 + tanh(x + x^3)). At most one of them
    is branching: nested comparisons take TVM's simplifier too long.
    """
    shape = _rows(shape_of(anchor.meta["val"]))
    region, inside, best = [anchor], {anchor}, 1
    while len(region) < _LONGEST:
        candidates = {user for node in region for user in node.users if user not in inside}
        following = min(candidates, key=lambda node: order.get(node, len(order)), default=None)
        if following is None or not _fits(following, shape, inside, order, order[anchor], element_wise):
            break
        if sum(map(branching, (*region, following))) > 1:
            break
        region.append(following)
        inside.add(following)
        if _exits(region, inside) == [following]:
            best = len(region)
    return region[1:best]


def _fits(
    node: Node,
    shape: tuple[Size, Size],
    inside: set[Node],
    order: Mapping[Node, int],
    position: int,
    element_wise: Callable[[Node], bool],
) -> bool:
    value = node.meta.get("val")
    if node not in order or not element_wise(node) or not isinstance(value, torch.Tensor):
        return False
    if _rows(shape_of(value)) != shape:
        return False
    return all(source in inside or order[source] < position for source in node.all_input_nodes)


def _rows(shape: Shape) -> tuple[Size, Size]:
    return product(shape[:-1]), shape[-1] if shape else 1


def _exits(region: list[Node], inside: set[Node]) -> list[Node]:
    return [node for node in region if any(user not in inside for user in node.users) or not node.users]
