"""Sorting along an axis: values in order and where they come from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules.sorting import sort
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import View, inverse, permuted

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _sorted(lowering: Lowering, node: Node) -> tuple[Any, Any]:
    """sort, stable or not, and topk: values and positions."""
    given = arguments(node)
    meta = node.meta["val"]
    shape = shape_of(meta[0] if isinstance(meta, (tuple, list)) else meta)
    source: View = lowering.view(given["self"])
    if not shape:
        source = lowering.view(reshape(lowering, source, (1,)))
    rank, axis = len(source.shape), int(given["dim"]) % len(source.shape)
    order = (*(number for number in range(rank) if number != axis), axis)
    kept = _kept(node, axis) or shape[axis] if shape else 1
    code = sort(permuted(source, order), kept, bool(given.get("descending", given.get("largest"))), lowering.target)
    values, places = (permuted(stored, inverse(order)) for stored in lowering.call(code))
    return (values, places) if shape else (reshape(lowering, values, shape), reshape(lowering, places, shape))


def _kept(node: Node, axis: int) -> int | None:
    """How many elements are read where all readers take the first ones: then only these are put in order."""
    parts = list(node.users)
    readers = [reader for part in parts for reader in part.users]
    if any(part.target is not operator.getitem for part in parts) or not readers:
        return None
    counts = [_first_ones(reader, axis) for reader in readers]
    return None if None in counts else max(count for count in counts if count is not None) or None


def _first_ones(reader: Node, axis: int) -> int | None:
    """The count, where this is a slice of the first elements that are surely there."""
    if reader.target is not aten.slice.Tensor:
        return None
    given, shape = arguments(reader), shape_of(reader.meta["val"])
    is_first = int(given["dim"]) % len(shape) == axis and given["start"] in (None, 0) and given["step"] == 1
    return given["end"] if is_first and shape[axis] == given["end"] and isinstance(given["end"], int) else None


def _positions(lowering: Lowering, node: Node) -> Any:
    return _sorted(lowering, node)[1]


TABLE: dict[Any, Callable[..., Any]] = {
    aten.sort.default: _sorted,
    aten.sort.stable: _sorted,
    aten.argsort.default: _positions,
    aten.argsort.stable: _positions,
    aten.topk.default: _sorted,
}
