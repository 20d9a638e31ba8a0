"""Products with weights in few bits, written into a program."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.low_bit.weight import LowBitWeight
from graphopt.operators.low_bit import MOST_GROUP, MOST_LOOKED_UP, TABLE_CODES
from graphopt.passes.lut_matmul.encoding import group_of
from graphopt.passes.lut_matmul.layers import TARGETS, Found, Layer, find_layer
from graphopt.passes.mixed_precision import following
from graphopt.program import Program

aten = torch.ops.aten
RULE = "lut-matmul"
FEW_ROWS = 4  # up to which one kernel reads each weight once
_BUILD = torch.ops.graphopt.lut_build.default
_FEW = torch.ops.graphopt.lut_gemv.default
_MANY = torch.ops.graphopt.wq_gemm.default


def write(
    program: Program, found: Found, weights: Mapping[str, LowBitWeight], table: str, kernel: str, context: PassContext
) -> PassResult:
    """The program with `weights`, by the name of their layer, as far as `context` allows."""
    edit = Edit(program, context, RULE)
    for editor in list(edit.graphs()):
        writer = _Writer(editor, table, kernel)
        for node in editor.nodes():
            if node.target not in TARGETS:
                continue
            name = editor.full_name(node)
            if name in weights:
                writer.rewrite(find_layer(editor, node, 0), weights[name])
            elif (reason := found.refused.get(name)) is not None:
                editor.decline(RULE, node, reason)
    return edit.finish()


def table_of(layer: Layer, table: str) -> str:
    """The table that a layer gets where `table` is asked for: products of many rows have none."""
    return "exact" if is_many(layer) else table


def is_many(layer: Layer) -> bool:
    return layer.rows is not None and layer.rows > FEW_ROWS


class _Writer:
    """Writes one graph; activations are built once for all layers that read the same value in the same way."""

    def __init__(self, editor: GraphEditor, table: str, kernel: str) -> None:
        self.editor = editor
        self.table = table
        self.kernel = kernel
        self.built: dict[Any, tuple[Node, ...]] = {}

    def rewrite(self, layer: Layer, weight: LowBitWeight) -> None:
        table = table_of(layer, self.table)
        kernel = "auto" if self.kernel == "lut" and is_many(layer) else self.kernel
        reason = _unfit(weight, table, kernel)
        if reason is not None:
            self.editor.decline(RULE, layer.node, reason)
            return
        fresh: dict[Any, tuple[Node, ...]] = {}
        computed = layer.bias is not None and self.editor.constant_value(layer.bias) is None

        def build(builder: Builder) -> list[Node]:
            given: list[Any] = [*self._activations(builder, layer.x, weight, table, fresh)]
            parts = (weight.codes, weight.scale, weight.zero, weight.codebook)
            given += [None if part is None else builder.constant(part) for part in parts]
            given += [None if computed else layer.bias, weight.bits, group_of(weight, table)]
            options: dict[str, Any] = {} if table == "exact" else {"table": table}
            if kernel != "auto":
                options["kernel"] = kernel
            if weight.tag is not None:
                options["tag"] = builder.constant(weight.tag)
            product = builder.call(_MANY if is_many(layer) else _FEW, *given, **options)
            return [builder.call(aten.add.Tensor, product, layer.bias) if computed else product]

        if self.editor.replace(RULE, [layer.node], build):
            self.built |= fresh

    def _activations(
        self, builder: Builder, x: Node, weight: LowBitWeight, table: str, fresh: dict[Any, tuple[Node, ...]]
    ) -> tuple[Node, ...]:
        """Codes, scales and sums of x, right behind it."""
        group = group_of(weight, table)
        key = x, group, table, _key(weight.permutation)
        known = self.built.get(key)
        if known is not None:
            return known
        with builder.graph.inserting_before(following(x)):
            value = x
            if weight.permutation is not None:
                order = builder.constant(weight.permutation)
                value = builder.call(torch.ops.aten.index_select.default, x, -1, order)
            options = {} if table == "exact" else {"table": table}
            triple = builder.call(_BUILD, value, group, **options)
            fresh[key] = tuple(builder.call(operator.getitem, triple, number) for number in range(3))
        return fresh[key]


def _unfit(weight: LowBitWeight, table: str, kernel: str) -> str | None:
    """Why no product is made of a weight, or sums of activations are not looked up by codes that are as they were."""
    if weight.group > MOST_GROUP:
        return f"sums of its groups of {weight.group} may not fit int32; give a group-size of at most {MOST_GROUP}"
    if table == "exact" and kernel != "lut":
        return None
    asked = "table=int8" if table == "int8" else "kernel=lut"
    if weight.codebook is not None:
        return f"{asked} sums bits of codes, and its weight has a codebook"
    if table == "int8" and group_of(weight, table) % TABLE_CODES:
        return f"table=int8 sums four activations, which do not divide its groups of {weight.group}"
    if table == "exact" and weight.bits > MOST_LOOKED_UP:
        return f"kernel=lut looks exact sums up for up to {MOST_LOOKED_UP} bits, and its weight has {weight.bits}"
    return None


def _key(permutation: Tensor | None) -> bytes:
    return b"" if permutation is None else permutation.numpy().tobytes()
