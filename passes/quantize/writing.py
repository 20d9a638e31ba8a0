"""Writing codes into a graph: a pair of quantize and dequantize in front of what reads codes, weights as codes.

    x -> quantize -> dequantize -+
            codes -> dequantize -+-> linear

Codes of a value are taken once, where it is made; each reader has a dequantize of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import graphopt.operators  # noqa: F401  registers graphopt::
from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.mixed_precision import following
from graphopt.passes.quantize.activations import ActivationForm, Range
from graphopt.passes.quantize.placement import CONVOLUTIONS, Layer, Placement
from graphopt.passes.quantize.weights import Encoded, WeightForm
from graphopt.passes.scale_folding import PRODUCTS

RULE = "quantize"
_QUANTIZE = torch.ops.graphopt.quantize.default
_DEQUANTIZE = torch.ops.graphopt.dequantize.default
_DYNAMIC = torch.ops.graphopt.dynamic_quantize.default


class Weights:
    """Codes of weights, made once however often a program is written or a weight is read."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Tensor, Encoded]] = {}  # with the weight, so that its id stays its own

    def of(self, weight: Tensor, form: WeightForm, outputs: int, inputs: int) -> Encoded:
        key = id(weight), form, outputs, inputs
        if key not in self._made:
            self._made[key] = weight, form.encode(weight, outputs, inputs)
        return self._made[key][1]


@dataclass
class Writer:
    """Writes one graph. `ranges` are by the name of a value's root, `forms` of weights by the name of the layer.

    `biases` are what takes the place of a layer's bias, by its name. Where `dynamic`, values get their range as they
    are computed.
    """

    editor: GraphEditor
    placement: Placement
    form: ActivationForm
    ranges: Mapping[str, Range]
    forms: Mapping[str, WeightForm]
    weights: Weights
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    dynamic: bool = False

    def __post_init__(self) -> None:
        self._current: dict[Node, Node] = {}
        self._codes: dict[tuple[Node, int | None], tuple[Node, ...]] = {}
        self._parameters: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._names = {node: self.editor.full_name(node) for node in (*self.placement.roots, *self.placement.layers)}

    def write(self) -> None:
        order = {node: number for number, node in enumerate(self.editor.graph.nodes)}
        everything = {*self.placement.readers, *self.placement.layers}
        for node in sorted(everything, key=order.__getitem__):
            self._rewrite(node)

    def _rewrite(self, node: Node) -> None:
        layer = self.placement.layers.get(node)
        values = self.placement.readers.get(node, ())
        missing = [value for value in values if not self.dynamic and self._root(value) not in self.ranges]
        if missing:
            reason = f"no sample reaches {missing[0].name}, or its values are never finite"
            self.editor.decline(RULE, node, reason)
            return
        form = self.forms.get(self._names[node]) if layer is not None else None
        if not values and form is None:
            return
        fresh: dict[tuple[Node, int | None], tuple[Node, ...]] = {}
        made: list[Node] = []

        def build(builder: Builder) -> list[Node]:
            operands = {}
            for value in values:
                at = self._current.get(value, value)
                operands[at] = self._coded(builder, node, at, value, fresh)
            if layer is not None and form is not None:
                self._add_weight(builder, layer, form, operands)
            made.append(builder.repeat(node, operands))
            if layer is not None and self._names[node] in self.biases:
                made[:] = [self._with_bias(builder, layer, made[0])]
            return made

        if self.editor.replace(RULE, [node], build):
            self._current[node] = made[0]
            self._codes |= fresh

    def _root(self, value: Node) -> str:
        return self._names[self.placement.roots[value]]

    def _coded(self, builder: Builder, node: Node, at: Node, value: Node, fresh: dict[Any, tuple[Node, ...]]) -> Node:
        """What `node` reads in the place of `at`, which is `value` as it is now."""
        axis = None
        if self.dynamic and node.target not in CONVOLUTIONS:
            axis = at.meta["val"].dim() - 1
        codes = self._codes.get((at, axis)) or fresh.get((at, axis))
        if codes is None:
            with builder.graph.inserting_before(following(at)):
                codes = fresh[at, axis] = self._take_codes(builder, at, value, axis)
        whole = {"qmin": 0, "qmax": 255} if self.dynamic else {key: self.form.codes[key] for key in ("qmin", "qmax")}
        where = {} if axis is None else {"axis": axis, "block": int(at.meta["val"].shape[axis])}
        return builder.call(_DEQUANTIZE, *codes, **where, **whole, dtype=torch.float32)

    def _take_codes(self, builder: Builder, at: Node, value: Node, axis: int | None) -> tuple[Node, ...]:
        """Codes, scale and zero point."""
        if self.dynamic:
            where = {} if axis is None else {"axis": axis}
            triple = builder.call(_DYNAMIC, at, **where)
            return tuple(builder.call(operator.getitem, triple, number) for number in range(3))
        root = self._root(value)
        if root not in self._parameters:
            self._parameters[root] = self.form.parameters(self.ranges[root])
        scale, zero = (None if part is None else builder.constant(part) for part in self._parameters[root])
        return builder.call(_QUANTIZE, at, scale, zero, **self.form.codes), scale, zero  # type: ignore[return-value]

    def _add_weight(self, builder: Builder, layer: Layer, form: WeightForm, operands: dict[Node, Node]) -> None:
        assert layer.weight is not None
        weight = self.editor.constant_value(layer.weight)
        assert weight is not None
        product = PRODUCTS[layer.node.target]
        operands[layer.weight] = self.weights.of(weight, form, product.outputs, product.inputs).build(builder)

    def _with_bias(self, builder: Builder, layer: Layer, node: Node) -> Node:
        """The same product with another bias; a sum behind it where its operator takes none."""
        bias = builder.constant(self.biases[self._names[layer.node]])
        name = PRODUCTS[layer.node.target].bias
        if name is None:
            return builder.call(torch.ops.aten.add.Tensor, node, bias)
        old = argument(layer.node, name)
        if isinstance(old, Node):
            return builder.repeat(node, {old: bias})
        place = [item.name for item in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
        args = [*node.args[:place], bias, *node.args[place + 1 :]]
        return builder.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
