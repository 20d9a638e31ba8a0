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

from graphopt.analysis.einsum import read_einsum
from graphopt.analysis.view import Kind, node_kinds
from graphopt.matcher import argument
from graphopt.program import Program

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default})
_FIXED = ("weight", "constant")
_KEEPING = frozenset(  # what may stand between scores and softmax, or softmax and values, besides views
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.tanh.default),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.to.dtype, aten._to_copy.default, aten.clone.default),
        *(aten.dropout.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default),
        *(aten.cat.default, aten.slice.Tensor, aten.maximum.default, aten.clamp.default, aten.clamp_min.default),
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
    [..., keys, width] in the fused form and [..., width, keys] where written out. Einsums may have axes in any order:
    those of `output` are where `axes` says, in the order above. `projection` is the product by a
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
    axes: tuple[int, ...]


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
    found: NoAttention | None = None
    output = next(_products(softmax, lambda node: list(node.users)), None)
    for scores in _products(softmax, lambda node: [item for item in node.all_input_nodes if kinds[item] == "data"]):
        if _is_projection(kinds, scores):
            continue
        if output is None:
            return NoAttention(softmax, "the softmax is not multiplied by values")
        candidate = _between(kinds, softmax, scores, output)
        if isinstance(candidate, Attention):
            return candidate
        found = found or candidate
    return found or NoAttention(softmax, "what the softmax is taken of is no product of two computed tensors")


def _between(kinds: Mapping[Node, Kind], softmax: Node, scores: Node, output: Node) -> Attention | NoAttention:
    """The attention of scores to output, if it is one."""
    factors, attended = _query_and_key(scores), _values(output, softmax)
    if factors is None:
        return NoAttention(softmax, f"{scores.name} has no axis of keys last")
    if attended is None:
        return NoAttention(softmax, f"the softmax is no left factor of {output.name} with its keys last")
    return _complete(kinds, softmax, output, *factors, *attended)


def _query_and_key(scores: Node) -> tuple[Any, Any] | None:
    if scores.target is not aten.einsum.default:
        return _factors(scores)
    einsum = read_einsum(scores)
    sides = einsum.split(einsum.result[-1]) if einsum else None
    return None if sides is None else (sides[0][0], sides[1][0])


def _values(output: Node, softmax: Node) -> tuple[Any, tuple[int, ...]] | None:
    """The values that the softmax is multiplied by, and where batch, heads, length and width are in the result."""
    if output.target is not aten.einsum.default:
        weights, values = _factors(output)
        rank = output.meta["val"].dim()
        return (values, tuple(range(rank))) if _comes_from(weights, softmax) else None
    einsum = read_einsum(output)
    if einsum is None:
        return None
    for (node, letters), (values, others) in (einsum.operands, einsum.operands[::-1]):
        if not _comes_from(node, softmax) or letters[-1] not in others or letters[-1] in einsum.result:
            continue
        shared = [axis for axis, letter in enumerate(einsum.result) if letter in letters and letter in others]
        length = [axis for axis, letter in enumerate(einsum.result) if letter not in others]
        width = [axis for axis, letter in enumerate(einsum.result) if letter not in letters]
        if len(length) == len(width) == 1:
            return values, (*shared, *length, *width)
    return None


def _complete(
    kinds: Mapping[Node, Kind],
    anchor: Node,
    output: Node,
    query: Any,
    key: Any,
    value: Any,
    axes: tuple[int, ...] | None = None,
) -> Attention | NoAttention:
    projections = _projections(kinds, query)
    if len(projections) != 1:
        found = ", ".join(node.name for node in projections) or "none"
        return NoAttention(anchor, f"its queries come from {found} and not from one product by a weight")
    (projection,) = projections
    keys = _projections(kinds, key)
    made_by = keys[0] if len(keys) == 1 else None
    axes = axes or tuple(range(output.meta["val"].dim()))
    return Attention(anchor, output, query, key, value, projection, _hidden(kinds, projection), made_by, axes)


def _hidden(kinds: Mapping[Node, Kind], projection: Node) -> Node:
    """What the product reads, before rows of two axes were put into one."""
    if (multiplied := _multiplied_by_weight(kinds, projection)) is not None:
        return multiplied
    hidden: Node = argument(projection, _INPUTS[projection.target])
    while hidden.target in _FLATTENING and hidden.meta["val"].dim() == 2:
        source = hidden.args[0]
        if not isinstance(source, Node) or source.meta["val"].dim() != 3 or _last(source) != _last(hidden):
            break
        hidden = source
    return hidden


def _last(node: Node) -> Any:
    return node.meta["val"].shape[-1]


def _products(softmax: Node, neighbours: Callable[[Node], list[Node]]) -> Iterator[Node]:
    """The products that the softmax is joined with by operators that keep what it is about, nearest first."""
    pending, seen = [softmax], {softmax}
    for node in pending:
        for item in neighbours(node):
            if item in seen or item.op != "call_function":
                continue
            seen.add(item)
            if _is_product(item):
                yield item
            elif item.target in _KEEPING and item.meta["val"].dim() >= 3:
                pending.append(item)


def _is_product(node: Node) -> bool:
    return node.target in _PRODUCTS and node.meta["val"].dim() >= 3


def _factors(product: Node) -> tuple[Any, Any]:
    first = 1 if product.target is aten.baddbmm.default else 0
    return product.args[first], product.args[first + 1]


def _comes_from(node: Any, source: Node) -> bool:
    pending, seen = [node], {node}
    for item in pending:
        if item is source:
            return True
        if isinstance(item, Node) and item.target in _KEEPING:
            pending += [other for other in item.all_input_nodes if other not in seen]
            seen.update(item.all_input_nodes)
    return False


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
        return _multiplied_by_weight(kinds, node) is not None
    weight = argument(node, WEIGHTS[node.target])
    return isinstance(weight, Node) and kinds[weight] in _FIXED and weight.meta["val"].dim() == 2


def _multiplied_by_weight(kinds: Mapping[Node, Kind], node: Node) -> Node | None:
    """The tensor whose last axis an einsum multiplies by a weight, row by row; None for any other node."""
    einsum = read_einsum(node)
    if einsum is None:
        return None
    for (tensor, letters), (weight, others) in (einsum.operands, einsum.operands[::-1]):
        summed = [letter for letter in letters if letter not in einsum.result]
        if kinds[tensor] not in _FIXED and kinds[weight] in _FIXED and letters and summed == [letters[-1]]:
            return tensor if set(letters) & set(others) == {letters[-1]} else None
    return None
