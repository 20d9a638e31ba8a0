"""Sums and means of codes over some axes, and means of windows.

Before: quantize(mean(dequantize(x), axes))        After: qsum(x, axes, divisor = number of codes in each mean)
Before: quantize(avg_pool2d(dequantize(x), 3))     After: qavg_pool(x, 3, divisor = 9)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import integer_pooling  # noqa: F401
from graphopt.operators.integer_sums import MOST_TERMS
from graphopt.passes.qdq_fusion.codes import Constants, codes_of, into_of, only_user
from graphopt.passes.qdq_fusion.products import Refused
from graphopt.propagate import shape_key

aten = torch.ops.aten
SUMS = frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.adaptive_avg_pool2d.default})
_ADAPTIVE = frozenset({aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default})
POOLS: Mapping[Any, int] = {  # spatial axes
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
}


def fuse_sum(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """The quantize `node` of a sum or mean of codes that nobody else reads."""
    into, source = into_of(editor, node), node.args[0]
    if into is None or not isinstance(source, Node) or source.target not in SUMS or only_user(source) is None:
        return False
    codes, axes = codes_of(editor, source.args[0]), _axes(source)
    if codes is None or axes is None:
        return False
    shape = shape_key(codes.node.meta["val"])
    sizes = [shape[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes) or not 0 < math.prod(sizes) <= MOST_TERMS:
        return False
    options = {
        "dim": list(axes),
        "keepdim": source.meta["val"].dim() == len(shape),
        "divisor": 1 if source.target is aten.sum.dim_IntList else math.prod(sizes),
        **{"qmin": into.low, "qmax": into.high, "dtype": into.dtype},
    }

    def build(builder: Builder) -> list[Node]:
        given = [*constants.of(builder, codes), *constants.parameters(builder, into)]
        return [builder.call(torch.ops.graphopt.qsum.default, *given, **options)]

    return editor.replace(rule, [node], build, inner=[source])


def fuse_average_pool(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """The quantize `node` of means of windows that nobody else reads. Raises Refused where windows do not fit."""
    into, source = into_of(editor, node), node.args[0]
    if into is None or not isinstance(source, Node) or source.target not in POOLS or only_user(source) is None:
        return False
    codes = codes_of(editor, source.args[0])
    if codes is None:
        return False
    window = _adaptive(source) if source.target in _ADAPTIVE else _window(source, POOLS[source.target])
    options = {**window, "qmin": into.low, "qmax": into.high, "dtype": into.dtype}

    def build(builder: Builder) -> list[Node]:
        given = [*constants.of(builder, codes), *constants.parameters(builder, into)]
        return [builder.call(torch.ops.graphopt.qavg_pool.default, *given, **options)]

    return editor.replace(rule, [node], build, inner=[source])


def _window(node: Node, spatial: int) -> dict[str, Any]:
    """The windows as `qavg_pool` takes them."""
    if node.meta["val"].dim() != spatial + 2:
        raise Refused("its images have no batch axis")
    size, stride, padding = (_each(argument(node, name), spatial) for name in ("kernel_size", "stride", "padding"))
    ceil, divisor = bool(argument(node, "ceil_mode")), _divisor(node)
    whole = argument(node, "count_include_pad") or not any(padding)
    if divisor is None and whole and not ceil:
        divisor = math.prod(size)
    elif divisor is None and any(padding) and argument(node, "count_include_pad"):
        raise Refused("its windows divide by the padding that they cover")
    return {
        **{"kernel_size": size, "stride": stride or size, "padding": padding, "ceil_mode": ceil},
        "divisor": divisor,
    }


def _divisor(node: Node) -> int | None:
    return None if node.target is aten.avg_pool1d.default else argument(node, "divisor_override")


def _adaptive(node: Node) -> dict[str, Any]:
    spatial = POOLS[node.target]
    counts = _each(argument(node, "output_size"), spatial)
    sizes = shape_key(node.args[0].meta["val"])[-spatial:]  # type: ignore[union-attr]
    if node.meta["val"].dim() != spatial + 2:
        raise Refused("its images have no batch axis")
    if not all(isinstance(size, int) and size % count == 0 for size, count in zip(sizes, counts, strict=True)):
        raise Refused("its windows are not of one size")
    size = [size // count for size, count in zip(sizes, counts, strict=True)]
    return {"kernel_size": size, "stride": size, "padding": [0] * spatial, "divisor": math.prod(size)}


def _each(numbers: Any, spatial: int) -> list[int]:
    found: list[int] = [numbers] if isinstance(numbers, int) else list(numbers)
    return found * spatial if len(found) == 1 else found


def _axes(node: Node) -> Sequence[int] | None:
    """The axes that are summed, from 0 on; None where the operator is no sum of float32 over some."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if node.target is aten.adaptive_avg_pool2d.default:
        size = argument(node, "output_size")
        return (rank - 2, rank - 1) if list(size) == [1, 1] else None
    axes, dtype = argument(node, "dim"), argument(node, "dtype")
    return None if not axes or dtype not in (None, torch.float32) else [axis % rank for axis in axes]
