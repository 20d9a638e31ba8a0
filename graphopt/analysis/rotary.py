"""Rotary embeddings of a graph (Su et al. 2021, arXiv 2104.09864): pairs of channels turned by an angle per position.

The normal form is x cos + rotated(x) sin, the factors in any order. Rotated are halves, [-second, first], or
neighbours, [-odd, even] interleaved. Where the two of a pair are turned one by one and put together last, that counts
too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.view import node_kinds
from graphopt.matcher import arguments
from graphopt.program import Program
from graphopt.propagate import shape_key

aten = torch.ops.aten

_JOINED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})


@dataclass(frozen=True)
class Rotary:
    """`output` is `value` [..., width] turned by the angles whose cosines and sines are given.

    They broadcast against `value`, or against half of its channels where the two of a pair are turned one by one.
    `interleaved`: channels 2i and 2i + 1 are a pair, otherwise i and i + width / 2.
    """

    output: Node
    value: Node
    cosine: Node
    sine: Node
    interleaved: bool


@dataclass(frozen=True)
class _Channels:
    """The channels `start`, `start + step`, ... below `stop` of the last axis of `value`."""

    value: Node
    start: int
    stop: int
    step: int


def find_rotaries(program: Program, path: str = "") -> Iterator[Rotary]:
    """Rotary embeddings of the graph at `path`, in order of execution. Raises UnknownNameError."""
    for node in node_kinds(program, path):
        found = _whole(node) or _by_halves(node)
        if found is not None:
            yield found


def _whole(node: Node) -> Rotary | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for turned, straight in (node.args[:2], node.args[1::-1]):
        for rotated, sine in _factors(turned):
            source = _rotated(rotated)
            if source is None:
                continue
            for value, cosine in _factors(straight):
                if value is source[0]:
                    return Rotary(node, value, cosine, sine, source[1])
    return None


def _factors(product: Any) -> tuple[tuple[Node, Node], ...]:
    """Both orders of the factors of a product of tensors; none of anything else."""
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return ()
    left, right = product.args
    return ((left, right), (right, left)) if isinstance(left, Node) and isinstance(right, Node) else ()


def _rotated(node: Node) -> tuple[Node, bool] | None:
    """What is rotated by a quarter turn, and whether its pairs are neighbours."""
    parts = _put_together(node)
    if parts is None or not isinstance(parts[0], Node) or parts[0].target is not aten.neg.default:
        return None
    value = _paired(node, parts[1], parts[0].args[0], parts[2])
    return None if value is None else (value, parts[2])


def _put_together(node: Node) -> tuple[Any, Any, bool] | None:
    """Two tensors, one behind the other along the last axis, or one channel of each in turn (True)."""
    if node.target is aten.cat.default:
        parts = _two_parts(node)
        return None if parts is None else (*parts, False)
    stacked: Any = node.args[0] if node.target in _JOINED else None
    parts = _two_parts(stacked) if isinstance(stacked, Node) else None
    if parts is None or stacked.target is aten.stack.default:
        return None if parts is None else (*parts, True)
    axis = stacked.meta["val"].dim() - 1
    if all(part.target is aten.unsqueeze.default and part.args[1] in (-1, axis) for part in parts):
        return parts[0].args[0], parts[1].args[0], True
    return None


def _two_parts(node: Node) -> tuple[Any, Any] | None:
    """What a cat or stack of two puts along the last axis of its result."""
    if node.target not in (aten.cat.default, aten.stack.default):
        return None
    parts, axis = arguments(node)[:2]
    return tuple(parts) if len(parts) == 2 and axis in (-1, node.meta["val"].dim() - 1) else None


def _paired(node: Node, first: Any, second: Any, interleaved: bool) -> Node | None:
    """The tensor, of the shape of `node`, whose pairs of channels these are."""
    one, other = _channels(first), _channels(second)
    if one is None or other is None or one.value is not other.value:
        return None
    same = shape_key(one.value.meta["val"]) == shape_key(node.meta["val"])
    return one.value if same and _are_pairs(one, other, interleaved) else None


def _are_pairs(first: _Channels, second: _Channels, interleaved: bool) -> bool:
    width = first.value.meta["val"].shape[-1]
    if not isinstance(width, int) or width % 2:
        return False
    found = [(part.start, part.stop, part.step) for part in (first, second)]
    half = width // 2
    return found == ([(0, width, 2), (1, width, 2)] if interleaved else [(0, half, 1), (half, width, 1)])


def _channels(node: Any) -> _Channels | None:
    """The part of the last axis that a slice or an item of a split reads."""
    if not isinstance(node, Node):
        return None
    source: Any = node.args[0] if node.args else None
    if node.target is aten.slice.Tensor:
        axis, start, stop, step = arguments(node)[1:]
        width = source.meta["val"].shape[-1]
        if axis not in (-1, source.meta["val"].dim() - 1) or not isinstance(width, int):
            return None
        return _Channels(source, *slice(start, stop, step).indices(width))
    if node.target is operator.getitem and source.target in (aten.split.Tensor, aten.split_with_sizes.default):
        return _item(source, int(node.args[1]))  # type: ignore[arg-type]
    return None


def _item(split: Node, place: int) -> _Channels | None:
    value: Any = split.args[0]
    axis = arguments(split)[2]
    sizes = [part.shape[-1] for part in split.meta["val"]]
    if axis not in (-1, value.meta["val"].dim() - 1) or not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:place])
    return _Channels(value, start, start + sizes[place], 1)


def _by_halves(node: Node) -> Rotary | None:
    """first cos - second sin and second cos + first sin, put together."""
    halves = _put_together(node)
    if halves is None or not all(isinstance(half, Node) and not half.kwargs for half in halves[:2]):
        return None
    straight, across, interleaved = halves
    if straight.target is not aten.sub.Tensor or across.target is not aten.add.Tensor:
        return None
    for first, cosine in _factors(straight.args[0]):
        for second, sine in _factors(straight.args[1]):
            value = _paired(node, first, second, interleaved)
            if value is not None and _is_sum(across, {second, cosine}, {first, sine}):
                return Rotary(node, value, cosine, sine, interleaved)
    return None


def _is_sum(node: Node, *products: set[Node]) -> bool:
    found = [set(term.args) for term in node.args[:2] if isinstance(term, Node) and term.target is aten.mul.Tensor]
    return found in (list(products), list(reversed(products)))
