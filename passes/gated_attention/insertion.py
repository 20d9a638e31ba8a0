"""Put a head-specific sigmoid gate behind every attention.

Before: y = attention(q, k, v), q made from x by one product
After:  y = attention(q, k, v) * 2 sigmoid(x Wᵀ + b)

x is what the product of the queries reads, as in Qiu et al. 2025, "Gated Attention for Large Language Models"
(arXiv 2505.06708), position G1. `headwise` makes one score a head, `elementwise` one a channel. W and b begin at zero,
so that the gate is one and results are the same to the bit in every float type; `form=plain` leaves the factor 2 to
the weight of the output projection, which is exact but for denormal weights.

`checkpoint` takes gates and all other weights from a network that was trained with them, whose query projection makes
queries and scores together; `rows` says in which order. Gates are sigmoid(x Wᵀ + b) then. Results are those of another
network: the pass is approximate, and data and a metric are what shows that the rows were read in the right order.

Declines an attention whose queries do not come from one product, whose axes do not show its heads, that is gated
already, and with `form=plain` one whose result does not go into one product by a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from graphopt.analysis.attention import FUSED, SOFTMAXES, Attention, NoAttention, find_attentions
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.errors import UsageError
from graphopt.matcher import argument
from graphopt.passes.gated_attention.account import describe
from graphopt.passes.gated_attention.checkpoint import GateWeights, Rows, TrainedGates, trained_gates
from graphopt.passes.gated_attention.fitting import fit_gates
from graphopt.passes.gated_attention.gates import REARRANGING, find_gate
from graphopt.passes.gated_attention.layout import Layout, find_layout, scores_as_heads
from graphopt.program import Program, full_name

aten = torch.ops.aten

_PRODUCTS: Mapping[Any, str] = {aten.linear.default: "weight", aten.addmm.default: "mat2", aten.mm.default: "mat2"}


@dataclass(frozen=True)
class GatedAttention(Pass):
    """Put a sigmoid gate that begins as the identity behind every attention."""

    name = "gated-attention"
    measured = False
    mode: Literal["headwise", "elementwise"] = "headwise"
    form: Literal["doubled", "plain"] = "doubled"
    layers: Literal["all"] | tuple[int, ...] = "all"
    fit_steps: int = 0
    checkpoint: str | None = None
    rows: Rows | None = None

    def __post_init__(self) -> None:
        if self.fit_steps < 0:
            raise UsageError(f"fit-steps={self.fit_steps} must be 0 or more")
        if (self.checkpoint is None) != (self.rows is None):
            raise UsageError("checkpoint and rows go together; give checkpoint=FILE and rows=per-group or per-head")
        if self.checkpoint is not None and self.form == "plain":
            raise UsageError("form says where the factor 2 of new gates goes, and a checkpoint has none; leave it out")
        if self.fit_steps or self.checkpoint is not None:
            object.__setattr__(self, "preserves", "approximate")  # of this instance: gates that learn change results
        if self.layers != "all" and (not self.layers or min(self.layers) < 0):
            raise UsageError(f"layers={list(self.layers)} names no attention; give numbers from 0, or all")

    def starts_at(self) -> frozenset[Any]:
        return frozenset({FUSED, *SOFTMAXES})

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        trained = None
        if self.checkpoint is not None and self.rows is not None:
            trained = trained_gates(self.checkpoint, program, self.mode, self.rows)
        weights = self._gate_all(edit, trained)
        result = edit.finish()
        if not result.rewrites:
            return result
        notes = list(result.notes)
        if trained is not None:
            notes += trained.load(result.program, weights)
        fitted = result.program
        if self.fit_steps:
            fitted, note = fit_gates(result.program, weights, context, self.fit_steps)
            notes.append(note)
        notes += describe(program, fitted, context)
        return replace(result, program=fitted, notes=tuple(notes))

    def _gate_all(self, edit: Edit, trained: TrainedGates | None) -> list[str]:
        """Gate the chosen attentions; returns the names of the weights added."""
        number, weights = 0, list[str]()
        for editor in edit.graphs():
            for found in list(find_attentions(edit.program, editor.path)):
                if isinstance(found, NoAttention):
                    editor.decline(self.name, found.anchor, found.reason)
                    continue
                if self.layers == "all" or number in self.layers:
                    weights += self._gate(editor, found, trained)
                number += 1
        if self.layers != "all" and (missing := [layer for layer in self.layers if layer >= number]):
            edit.notes.append(f"there is no attention {missing[0]}: the program has {number}, counted from 0")
        if trained is not None and not trained.gates:
            reason = edit.declined[-1].reason if edit.declined else "no attention was chosen"
            raise UsageError(f"no attention takes a gate from {self.checkpoint}: {reason}")
        return weights

    def _gate(self, editor: GraphEditor, attention: Attention, trained: TrainedGates | None) -> list[str]:
        """Gate one attention; returns the names of the weights added."""
        output, hidden = attention.output, attention.hidden
        layout = find_layout(attention)
        reason = layout if isinstance(layout, str) else why_not(output, hidden)
        if reason is not None or isinstance(layout, str):
            editor.decline(self.name, output, reason or "")
            return []
        made = trained.gate(editor, attention, layout) if trained else make_gate(layout, hidden, self.mode)
        if isinstance(made, str):
            editor.decline(self.name, output, made)
            return []
        doubled = self.form == "doubled" and trained is None

        def gate(builder: Builder) -> Node:
            return gated(builder, attention, layout, made, doubled)

        if self.form == "plain":
            done = self._replace_projection(editor, output, gate)
        else:
            done = editor.replace(self.name, [output], lambda builder: [gate(builder)], at=output.next)
        tensors = [item for item in made if item is not None] if done else []
        return [full_name(editor.path, editor.attribute_for(item)[0]) for item in tensors]

    def _replace_projection(self, editor: GraphEditor, output: Node, gate: Callable[[Builder], Node]) -> bool:
        """Gate the output where its way to the output projection begins, and double that projection's weight."""
        way = way_to_product(output)
        product = way[-1] if way else output
        weight = editor.constant_value(argument(product, _PRODUCTS[product.target])) if way else None
        if weight is None:
            editor.decline(self.name, output, "what is attended to does not go into one product by a weight alone")
            return False
        doubled = torch.nn.Parameter(weight.detach() * 2, weight.requires_grad)
        if not doubled.isfinite().all():
            editor.decline(self.name, output, f"twice the weight of {product.name} is not finite in {weight.dtype}")
            return False

        def build(builder: Builder) -> list[Node]:
            values = {output: gate(builder)}
            for node in way[:-1]:
                values[node] = builder.repeat(node, values)
            values[argument(product, _PRODUCTS[product.target])] = builder.constant(doubled)
            return [builder.repeat(product, values)]

        return editor.replace(self.name, [product], build, inner=way[:-1])


def why_not(output: Node, hidden: Node) -> str | None:
    """What stands against a gate behind `output`."""
    value, features = hidden.meta["val"], hidden.meta["val"].shape[-1]
    if not isinstance(features, int):
        return f"its queries are made from rows of {features}, which is no number"
    if not value.dtype.is_floating_point or value.dtype != output.meta["val"].dtype:
        return f"its queries are made from {value.dtype} and it gives {output.meta['val'].dtype}"
    return "it is gated already" if find_gate(output) is not None else None


def make_gate(layout: Layout, hidden: Node, mode: str) -> GateWeights:
    """Weight [scores, features] and bias [scores] of a gate that is the same everywhere: zeros."""
    scores = layout.heads * (layout.width if mode == "elementwise" else 1)
    weight = torch.zeros(scores, hidden.meta["val"].shape[-1], dtype=hidden.meta["val"].dtype)
    return torch.nn.Parameter(weight), torch.nn.Parameter(weight.new_zeros(scores))


def gated(builder: Builder, attention: Attention, layout: Layout, weights: GateWeights, doubled: bool) -> Node:
    """What is attended to, times its gate."""
    scores = builder.call(aten.linear.default, attention.hidden, *weights)
    gate = builder.call(aten.sigmoid.default, scores)
    if doubled:
        gate = builder.call(aten.mul.Tensor, gate, 2.0)
    return builder.call(aten.mul.Tensor, attention.output, scores_as_heads(builder, layout, gate))


def way_to_product(output: Node) -> list[Node]:
    """The single readers, one after another, that rearrange the axes, and the product they end in; else nothing."""
    way: list[Node] = []
    node = output
    while len(node.users) == 1:
        (node,) = node.users
        way.append(node)
        if node.target in _PRODUCTS:
            return way
        if node.target not in REARRANGING:
            break
    return []
