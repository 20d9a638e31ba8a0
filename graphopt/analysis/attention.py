"""Attentions of a graph: each softmax of scores times values, with the projection that its queries come from.

Both forms count: the fused operator, and softmax(Q Kᵀ) V written out with whatever scales and masks the scores. The
projection is found from the queries backwards, through head splitting, rotary embeddings and norms of queries. Names
of modules play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.view import Kind, node_kinds
from graphopt.matcher import argument
from graphopt.program import Program

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})
_KEEPING = frozenset(  # what may stand between scores and softmax, or softmax and values, besides views
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.tanh.default),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.to.dtype, aten._to_copy.default, aten.clone.default),
        *(aten.dropout.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default),
    }
)
WEIGHTS: Mapping[Any, str] = {  # products by a weight, and the name of the argument that is one
    aten.linear.default: "weight",
    aten.addmm.default: "mat2",
    aten.mm.default: "mat2",
    aten.matmul.default: "other",
}
_INPUTS: Mapping[Any, str] = {
    aten.linear.default: "input",
    aten.addmm.default: "mat1",
    aten.mm.default: "self",
    aten.matmul.default: "self",
}
_FLATTENING = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Attention:
    """One attention; sizes of `output` and `query`: [batch, heads, length, width], or [batch x heads, length, width].

    `output` is the node with what is attended to, head by head. `anchor` is the fused call or the softmax. `key` is
    [..., keys, width] in the fused form and [..., width, keys] where written out. `projection` is the product by a
    weight that the queries come from, alone or with keys and values, and `hidden` the tensor that it reads,
    [..., features]. `keys` is the product that the keys come from, None where there are several.
    """

    anchor: Node
    output: Node
    query: Node
    key: Node
    value: Node
    projection: Node
    hidden: Node
    keys: Node | None


@dataclass(frozen=True)
class NoAttention:
    """A place that begins like an attention; `reason` is a clause that says what it lacks."""

    anchor: Node
    reason: str


def find_attentions(program: Program, path: str = "") -> Iterator[Attention | NoAttention]:
    """Attentions of the graph at `path`, in order of execution, and softmaxes that are none."""
    kinds = node_kinds(program, path)
    for node in list(kinds):
        if node.target is FUSED:
            query, key, value = node.args[:3]
            yield _complete(kinds, node, node, query, key, value)
        elif node.target in SOFTMAXES:
            yield _written_out(kinds, node)


def _written_out(kinds: Mapping[Node, Kind], softmax: Node) -> Attention | NoAttention:
    scores = _follow(softmax, lambda node: [a for a in node.args[:2] if isinstance(a, Node) and kinds[a] == "data"])
    if scores is None:
        return NoAttention(softmax, "what the softmax is taken of is no product of two computed tensors")
    output = _follow(softmax, lambda node: list(node.users))
    if output is None or not _is_product(output):
        return NoAttention(softmax, "the softmax is not multiplied by values")
    left, right = _factors(scores)
    weights, values = _factors(output)
    if not _comes_from(weights, softmax):
        return NoAttention(softmax, "the softmax is the right factor of its product")
    return _complete(kinds, softmax, output, left, right, values)


def _complete(
    kinds: Mapping[Node, Kind], anchor: Node, output: Node, query: Any, key: Any, value: Any
) -> Attention | NoAttention:
    projections = _projections(kinds, query)
    if len(projections) != 1:
        found = ", ".join(node.name for node in projections) or "none"
        return NoAttention(anchor, f"its queries come from {found} and not from one product by a weight")
    (projection,) = projections
    keys = _projections(kinds, key)
    made_by = keys[0] if len(keys) == 1 else None
    return Attention(anchor, output, query, key, value, projection, _unflattened(projection), made_by)


def _unflattened(projection: Node) -> Node:
    """What the product reads, before its rows were put into one axis."""
    hidden = argument(projection, _INPUTS[projection.target])
    while hidden.target in _FLATTENING and _last(hidden) == _last(hidden.args[0]):
        if hidden.args[0].meta["val"].dim() <= hidden.meta["val"].dim():
            break
        hidden = hidden.args[0]
    found: Node = hidden
    return found


def _last(node: Node) -> Any:
    return node.meta["val"].shape[-1]


def _follow(softmax: Node, neighbours: Callable[[Node], list[Node]]) -> Node | None:
    """The first product on the way along single neighbours that keep what the softmax is about."""
    node = softmax
    while True:
        found = [item for item in neighbours(node) if item.op == "call_function"]
        products = [item for item in found if _is_product(item)]
        if len(products) == 1:
            return products[0]
        kept = [item for item in found if item.target in _KEEPING and item.meta["val"].dim() >= 3]
        if len(kept) != 1 or products:
            return None
        node = kept[0]


def _is_product(node: Node) -> bool:
    return node.target in _PRODUCTS and node.meta["val"].dim() >= 3


def _factors(product: Node) -> tuple[Any, Any]:
    first = 1 if product.target is aten.baddbmm.default else 0
    return product.args[first], product.args[first + 1]


def _comes_from(node: Any, source: Node) -> bool:
    while isinstance(node, Node) and node is not source and node.target in _KEEPING:
        node = node.args[0]
    return node is source


def _projections(kinds: Mapping[Node, Kind], query: Any) -> list[Node]:
    """The products by a weight nearest to the queries, in order of execution."""
    found: set[Node] = set()
    pending, seen = [query], {query}
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or kinds.get(node) != "data":
            continue
        if _is_projection(kinds, node):
            found.add(node)
            continue
        if node.target is FUSED or node.target in SOFTMAXES:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return sorted(found)


def _is_projection(kinds: Mapping[Node, Kind], node: Node) -> bool:
    if node.target not in WEIGHTS:
        return False
    weight = argument(node, WEIGHTS[node.target])
    return isinstance(weight, Node) and kinds[weight] in ("weight", "constant") and weight.meta["val"].dim() == 2
