"""Scaled dot-product attention from its parts: products, scale, mask, softmax and the guard for fully masked rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from torch.fx import Node

from graphopt.capture.raising.composites import near, rank
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.program import Program
from graphopt.propagate import shape_key

aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """softmax(scale * query transposed_key + the sum of masks) value."""

    query: Node
    transposed_key: Node
    value: Node
    masks: tuple[Node, ...]
    scale: float


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Rows that are masked throughout give zeros, as in PyTorch's operator, with or without the exporter's guard."""

    name: ClassVar[str] = "raising"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                parts = find_parts(editor, node)
                if parts is not None:
                    _replace(editor, node, parts)
        return edit.finish()


def find_parts(editor: GraphEditor, node: Node) -> Parts | None:
    """The parts of the attention that ends in `node`, over four axes; None where it ends none."""
    if node.target is not aten.matmul.default or rank(node) != 4:
        return None
    weights, value = node.args
    softmax = _without_guard(editor, weights)
    if softmax.target is not aten.softmax.int or softmax.args[1] not in (-1, rank(softmax) - 1):
        return None
    if any(
        user is not node and user is not weights and user.target is not aten.isnan.default for user in softmax.users
    ):
        return None
    scores, masks = _without_masks(softmax.args[0])
    product, scale = _without_scale(scores)
    if product.target is not aten.matmul.default or rank(product) != 4:
        return None
    query, before = _without_scale(product.args[0])
    key, after = _without_scale(product.args[1])
    if not (rank(query) == rank(key) == rank(value) == 4) or not isinstance(value, Node):
        return None
    return Parts(query, key, value, masks, scale * before * after)


def _without_guard(editor: GraphEditor, weights: Any) -> Node:
    """What zeros have been put into where a whole row was masked and its softmax is no number."""
    if weights.target is aten.masked_fill.Scalar and near(weights.args[2] + 1, 1):
        inner, mask = weights.args[:2]
        if mask.target is aten.isnan.default and mask.args[0] is inner:
            return inner  # type: ignore[no-any-return]
    if weights.target is aten.where.self:
        mask, filled, inner = weights.args
        zero = editor.constant_value(filled)
        if mask.target is aten.isnan.default and mask.args[0] is inner and zero is not None and not zero.any():
            return inner  # type: ignore[no-any-return]
    return weights  # type: ignore[no-any-return]


def _without_masks(scores: Any) -> tuple[Node, tuple[Node, ...]]:
    """The product, and what is added to it in the order of the additions: T5 adds a bias and a mask."""
    if scores.target is aten.add.Tensor and isinstance(scores.args[1], Node) and not scores.kwargs:
        for rest, mask in (scores.args, reversed(scores.args)):
            inner, before = _without_masks(rest)
            if _without_scale(inner)[0].target is aten.matmul.default:
                return inner, (*before, mask)
    return scores, ()


def _without_scale(value: Any) -> tuple[Node, float]:
    scale = 1.0
    while value.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(value.args[1], (int, float)):
        scale = scale * value.args[1] if value.target is aten.mul.Tensor else scale / value.args[1]
        value = value.args[0]
    return value, scale


def _replace(editor: GraphEditor, node: Node, parts: Parts) -> None:
    width = parts.query.meta["val"].shape[-1]
    usual = 1 / math.sqrt(width) if isinstance(width, int) and width else 0.0
    scale = usual if near(parts.scale, usual) else parts.scale
    masks = parts.masks if len(parts.masks) != 1 else (_allowed(editor, parts.masks[0]),)

    def build(builder: Builder) -> list[Node]:
        given = () if not masks else (reduce(partial(builder.call, aten.add.Tensor), masks),)
        key = _key(builder, parts.transposed_key)
        operands = (parts.query, key, parts.value, *given)
        return [builder.call(aten.scaled_dot_product_attention.default, *operands, scale=scale)]

    editor.replace("raising/attention", [node], build)


def _allowed(editor: GraphEditor, mask: Node) -> Node:
    """The truth values behind a mask of 0 where they hold and minus infinity elsewhere; any other mask itself."""
    if mask.target is not aten.where.self:
        return mask
    condition, zero, low = mask.args
    values = [editor.constant_value(item) for item in (zero, low)]
    numbers = [value.item() if value is not None and value.numel() == 1 else None for value in values]
    same = isinstance(condition, Node) and shape_key(condition.meta["val"]) == shape_key(mask.meta["val"])
    return condition if same and numbers == [0.0, -math.inf] else mask  # type: ignore[return-value]


def _key(builder: Builder, transposed: Node) -> Node:
    """The key before the exporter turned its last two axes; turned back where that is not in sight."""
    arguments: Any = transposed.args
    if transposed.target is aten.transpose.int and {axis % 4 for axis in arguments[1:]} == {2, 3}:
        return arguments[0]  # type: ignore[no-any-return]
    if transposed.target is aten.permute.default and list(arguments[1]) == [0, 2, 3, 1]:
        return builder.call(aten.transpose.int, arguments[0], 1, 2)
    return _before_rows(builder, transposed) or builder.call(aten.transpose.int, transposed, 2, 3)


def _before_rows(builder: Builder, transposed: Node) -> Node | None:
    """The key of [batch, heads, seq, width] that was turned as [batch * heads, seq, width]."""
    if transposed.target is not aten.view.default:
        return None
    rows: Any = transposed.args[0]
    if rows.target is not aten.transpose.int or rank(rows) != 3:
        return None
    flat: Any = rows.args[0]
    if {axis % 3 for axis in rows.args[1:]} != {1, 2} or flat.target is not aten.view.default:
        return None
    batch, heads, width, length = shape_key(transposed.meta["val"])
    if shape_key(flat.meta["val"])[1:] != (length, width):
        return None
    key = flat.args[0]
    if key.target is aten.clone.default:
        key = key.args[0]
    if shape_key(key.meta["val"]) == (batch, heads, length, width):
        return key  # type: ignore[no-any-return]
    sizes: Any = transposed.args[1]
    return builder.call(aten.view.default, flat, [*sizes[:2], sizes[3], sizes[2]])
