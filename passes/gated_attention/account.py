"""What gates change in a network's attention: how much of it falls on the first token, activations, and the gates.

The figures of Qiu et al. 2025 (arXiv 2505.06708), table 4: attention that rests on the first token and single huge
activations go together, and sparse gates take both away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.attention import FUSED, NoAttention, find_attentions
from graphopt.analysis.cost import node_costs, total_cost
from graphopt.analysis.storage import stored_weights
from graphopt.contract import PassContext
from graphopt.data.dataset import Sample
from graphopt.interpreter import ProgramInterpreter
from graphopt.matcher import argument
from graphopt.passes.gated_attention.gates import find_gate
from graphopt.passes.gated_attention.layout import Layout, find_layout
from graphopt.program import Program, full_name

aten = torch.ops.aten

SAMPLES = 64  # at most so many are run
_PRODUCTS = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default})


@dataclass
class Account:
    """Sums while samples are run. `gates` [attention][head] are of the gates that were named."""

    shares: list[float] = field(default_factory=list)
    largest: float = 0.0
    gates: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def first_token_share(self) -> float:
        """The share of attention on the first key, averaged over samples, heads and queries."""
        return math.fsum(self.shares) / len(self.shares) if self.shares else math.nan

    def mean_gates(self) -> dict[str, list[float]]:
        """The mean gate of each head, by the name of the gate's node."""
        return {name: torch.stack(rows).mean(0).tolist() for name, rows in self.gates.items()}


def describe(before: Program, after: Program, context: PassContext) -> list[str]:
    """Sentences on what gates cost, and with data on what they do."""
    costs = [total_cost(node_costs(program).values()).macs for program in (before, after)]
    sizes = [sum(item.elements for item in stored_weights(program)) for program in (before, after)]
    notes = [f"gates added {sizes[1] - sizes[0]} parameters and {costs[1] - costs[0]} multiply-adds, at example sizes"]
    if context.data is None:
        return notes
    context.progress("measuring attention", 0, 1)
    old, new = (measure_attention(program, context.data.fit) for program in (before, after))
    notes.append(f"attention on the first token: {old.first_token_share:.3f} before, {new.first_token_share:.3f} after")
    notes.append(f"largest result of a product by a weight: {old.largest:.4g} before, {new.largest:.4g} after")
    for name, means in new.mean_gates().items():
        notes.append(f"mean gate of each head at {name}: {', '.join(f'{mean:.3f}' for mean in means)}")
    return notes


def measure_attention(program: Program, samples: Iterable[Sample]) -> Account:
    """Run the first samples."""
    account, (seen, gates) = Account(), _watched(program)
    values: dict[str, Any] = {}
    wanted = {name for names, _ in seen.values() for name in names}
    products = {
        full_name(path, node.name)
        for path, module in program.graphs()
        for node in module.graph.nodes
        if node.target in _PRODUCTS
    }

    def see(name: str, value: Any) -> None:
        if name in wanted:
            values[name] = value
        if name in products:
            account.largest = max(account.largest, float(value.abs().max()))
        if name in seen:
            _, weights = seen[name]
            account.shares.append(float(weights(values, value)[..., 0].double().mean()))
        if name in gates:
            heads, factor = gates[name]
            rows = value.double().unflatten(-1, (heads, -1)).movedim(-2, 0).flatten(1).mean(1)
            account.gates.setdefault(name, []).append(rows * factor)

    for sample in islice(samples, SAMPLES):
        with torch.no_grad():
            inputs = (*sample.inputs, *(item.initial for item in program.state))
            ProgramInterpreter(program.graph_module, see=see).run(*inputs)
    return account


Weights = Callable[[dict[str, Any], Any], torch.Tensor]  # of values by name and the anchor's own value


def _watched(program: Program) -> tuple[dict[str, tuple[list[str], Weights]], dict[str, tuple[int, float]]]:
    """For each attention's anchor the values it needs and how its weights [..., queries, keys] are found.

    Then for each gate's sigmoid its heads and factor.
    """
    found: dict[str, tuple[list[str], Weights]] = {}
    gates: dict[str, tuple[int, float]] = {}
    for path, _ in program.graphs():
        for item in find_attentions(program, path):
            if isinstance(item, NoAttention):
                continue
            names = {node: full_name(path, node.name) for node in item.anchor.all_input_nodes}
            found[full_name(path, item.anchor.name)] = list(names.values()), _weights_of(item.anchor, names)
            gate = find_gate(item.output)
            layout = find_layout(item)
            if gate is not None and isinstance(layout, Layout):
                gates[full_name(path, gate.sigmoid.name)] = layout.heads, gate.factor
    return found, gates


def _weights_of(anchor: Node, names: dict[Node, str]) -> Weights:
    if anchor.target is not FUSED:
        return lambda values, own: own

    def value(values: dict[str, Any], name: str) -> Any:
        given = argument(anchor, name)
        return values[names[given]] if isinstance(given, Node) else given

    def weights(values: dict[str, Any], own: Any) -> torch.Tensor:
        query, key, mask, causal, scale = (
            value(values, name) for name in ("query", "key", "attn_mask", "is_causal", "scale")
        )
        if query.dim() > 3 and key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        found: torch.Tensor = scores.softmax(-1).nan_to_num(0.0)
        return found

    return weights
