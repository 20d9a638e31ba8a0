"""How the gate's axes follow the attention's: scores are made row by row of X and multiplied head by head.

X is [batch, length, features], [length, batch, features] (as in `torch.nn.MultiheadAttention`) or [length, features];
what the heads attend to is [batch, heads, length, width] or, with one axis for both, [batch x heads, length, width];
an einsum may give it in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.attention import Attention
from graphopt.edit import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """Where the gate of one attention goes.

    `order` brings scores [rows of X, heads, width or 1] to the axes of the attention's output, width or 1 in place of
    the width; `flat` is whether batch and heads share an axis.
    """

    heads: int
    width: int
    order: tuple[int, ...]
    flat: bool


def find_layout(attention: Attention) -> Layout | str:
    """The layout by sizes, or a clause that says why there is none."""
    output, hidden = attention.output.meta["val"], attention.hidden.meta["val"]
    found = _layout(output.permute(attention.axes), hidden)
    if isinstance(found, str) or attention.axes == tuple(range(output.dim())):
        return found
    if found.flat or len(found.order) != output.dim():
        return f"its axes, {_text(output)}, are in an order that {_text(hidden)} cannot be brought to"
    return replace(found, order=tuple(found.order[attention.axes.index(axis)] for axis in range(output.dim())))


def _layout(output: torch.Tensor, hidden: torch.Tensor) -> Layout | str:
    width = output.shape[-1]
    if not isinstance(width, int):
        return f"its heads are {width} wide, which is no number"
    if output.dim() == 4:
        batch, heads, length = output.shape[:3]
        flat = False
    elif output.dim() == 3:
        found = _flat_heads(output, hidden)
        if isinstance(found, str):
            return found
        batch, heads, length = found
        flat = hidden.dim() == 3
    else:
        return f"it has {output.dim()} axes, not [batch, heads, length, width]"
    if not isinstance(heads, int):
        return f"it has {heads} heads, which is no number"
    rows = hidden.shape[:-1]
    if len(rows) == 2 and _same(rows, (batch, length)):
        if _same(rows, (length, batch)) and not _same((batch,), (1,)):
            return f"batch and length are both {batch}, so that they cannot be told apart; capture with different sizes"
        return Layout(heads, width, (0, 2, 1, 3), flat)
    if len(rows) == 2 and _same(rows, (length, batch)):
        return Layout(heads, width, (1, 2, 0, 3), flat)
    if len(rows) == 1 and _same(rows, (length,)) and _same((batch,), (1,)):
        return Layout(heads, width, (1, 0, 2), flat)
    return f"its queries are made from {_text(hidden)}, whose rows are not those of {_text(output)}"


def _flat_heads(output: torch.Tensor, hidden: torch.Tensor) -> tuple[Any, Any, Any] | str:
    """Batch, heads and length of [batch x heads, length, width]."""
    both, length, _ = output.shape
    rows = hidden.shape[:-1]
    if len(rows) == 1:
        return 1, both, length
    if len(rows) == 2 and _same((length,), rows[:1]) and _same((length,), rows[1:]):
        return f"batch and length are both {length}, so that they cannot be told apart; capture with different sizes"
    if len(rows) == 2:
        for batch, other in (rows, tuple(reversed(rows))):
            if _same((length,), (other,)):
                heads = both // batch
                return batch, int(heads) if _is_number(heads) else heads, length
    return f"its queries are made from {_text(hidden)}, whose rows are not those of {_text(output)}"


def _is_number(size: Any) -> bool:
    return isinstance(size, int) or size.node.expr.is_number


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Equal sizes, symbolic ones by their expressions: comparing them would make a guard."""
    return len(left) == len(right) and all(_key(a) == _key(b) for a, b in zip(left, right, strict=True))


def _key(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _text(value: torch.Tensor) -> str:
    return f"[{', '.join(map(str, value.shape))}]"


def scores_as_heads(builder: Builder, layout: Layout, scores: Node) -> Node:
    """Scores [rows of X, heads] or [rows of X, heads x width] in the axes of the attention's output."""
    parts = scores.meta["val"].shape[-1] // layout.heads
    split = builder.call(aten.unflatten.int, scores, -1, [layout.heads, parts])
    arranged = builder.call(aten.permute.default, split, list(layout.order))
    return builder.call(aten.flatten.using_ints, arranged, 0, 1) if layout.flat else arranged
