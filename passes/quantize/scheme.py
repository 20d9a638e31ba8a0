"""What is to be written where: everything that was found out, from which the program follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext, PassResult
from graphopt.edit import Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.quantize.activations import ActivationForm, Range
from graphopt.passes.quantize.placement import Placement, Rules, place
from graphopt.passes.quantize.weights import WeightForm
from graphopt.passes.quantize.writing import RULE, Weights, Writer
from graphopt.passes.scale_folding import PRODUCTS
from graphopt.program import Program

_EMBEDDING = torch.ops.aten.embedding.default
Activations = Literal["int8", "dynamic-int8", "none"]


@dataclass(frozen=True)
class Scheme:
    """Codes for `program`: `weight` for every layer but those in `forms`, by name, `ranges` by the name of a root.

    `floats` are the operators that stay float32, by name, and why. `biases` take the place of layers' own.
    """

    program: Program
    activations: Activations
    form: ActivationForm
    weight: WeightForm | None
    whole_sums: bool
    floats: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, WeightForm] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)

    def rules(self) -> Rules:
        static = self.activations == "int8"
        return Rules(
            floats=self._why_float,
            weighted=self.activations != "none",
            pairs=static,
            between=static,
            whole_sums=self.whole_sums,
        )

    def _why_float(self, editor: GraphEditor, node: Node) -> str | None:
        name = editor.full_name(node)
        form = self.form_of(name)
        if form is not None and node.target in PRODUCTS:
            weight = editor.constant_value(argument(node, PRODUCTS[node.target].weight))
            if weight is not None and (reason := form.refusal(weight)) is not None:
                return reason
        return self.floats.get(name)

    def survey(self) -> tuple[list[Placement], Callable[[Node], str]]:
        """The placement in every graph, and the full names of nodes; nothing is written."""
        names: dict[Node, str] = {}
        placements = []
        for editor in Edit(self.program, PassContext(), RULE).graphs():
            placement = place(editor, self.rules())
            placements.append(placement)
            names.update((node, editor.full_name(node)) for node in (*placement.layers, *placement.roots))
        return placements, names.__getitem__

    def form_of(self, name: str) -> WeightForm | None:
        return self.forms.get(name, self.weight)

    def write(self, context: PassContext) -> PassResult:
        """The program with codes, as far as `context` allows."""
        edit = Edit(self.program, context, RULE)
        for editor in list(edit.graphs()):
            placement = place(editor, self.rules())
            for item in placement.refused:
                editor.decline(RULE, item.node, item.reason)
            for node in editor.graph.find_nodes(op="call_function", target=_EMBEDDING) if self.weight else ():
                if editor.constant_value(argument(node, "weight")) is not None:
                    editor.decline(
                        RULE, node, "the table of an embedding stays float32: only weights of products get codes"
                    )
            forms = {
                name: form
                for node, layer in placement.layers.items()
                if layer.weight is not None and (form := self.form_of(name := editor.full_name(node))) is not None
            }
            dynamic = self.activations == "dynamic-int8"
            Writer(editor, placement, self.form, self.ranges, forms, self.weights, self.biases, dynamic).write()
        return edit.finish()
