"""Sums and means of codes over some axes.

Before: quantize(mean(dequantize(x), axes))        After: qsum(x, axes, divisor = number of codes in each mean)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators.integer_sums import MOST_TERMS
from graphopt.passes.qdq_fusion.codes import Constants, codes_of, into_of, only_user
from graphopt.propagate import shape_key

aten = torch.ops.aten
SUMS = frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.adaptive_avg_pool2d.default})


def fuse_sum(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """The quantize `node` of a sum or mean of codes that nobody else reads."""
    into, source = into_of(editor, node), node.args[0]
    if into is None or not isinstance(source, Node) or source.target not in SUMS or only_user(source) is None:
        return False
    codes, axes = codes_of(editor, source.args[0]), _axes(source)
    if codes is None or axes is None or into.reciprocal:
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


def _axes(node: Node) -> Sequence[int] | None:
    """The axes that are summed, from 0 on; None where the operator is no sum of float32 over some."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if node.target is aten.adaptive_avg_pool2d.default:
        size = argument(node, "output_size")
        return (rank - 2, rank - 1) if list(size) == [1, 1] else None
    axes, dtype = argument(node, "dim"), argument(node, "dtype")
    return None if not axes or dtype not in (None, torch.float32) else [axis % rank for axis in axes]
