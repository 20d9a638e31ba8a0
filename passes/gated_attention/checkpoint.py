"""The weights of a network that was trained with gates: safetensors files whose query projections are widened.

Such a projection makes queries and gate scores together (Qiu et al. 2025, arXiv 2505.06708). `per-group` is the
layout of the paper's repository: the rows of each group of heads that share a key are the group's queries, then its
gates. In `per-head`, that of Qwen3-Next, each head's queries are followed by its own gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.fx import Node

from graphopt.analysis.attention import WEIGHTS, Attention, find_attentions
from graphopt.edit import GraphEditor
from graphopt.errors import UsageError
from graphopt.matcher import argument
from graphopt.near_miss import describe
from graphopt.passes.gated_attention.layout import Layout
from graphopt.program import Program, full_name, set_attribute

aten = torch.ops.aten

Rows = Literal["per-group", "per-head"]
GateWeights = tuple[torch.nn.Parameter, torch.nn.Parameter | None]  # [scores, features] and [scores]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, each in one of the files at `path`."""

    path: str
    files: Mapping[str, Path]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the type in which it was saved."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint in a `.safetensors` file or a folder of them; only headers are read.

    Raises UsageError where there is none, where a file is damaged, and where two files have a tensor of one name.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not found or (place.suffix != ".safetensors" and not place.is_dir()):
        raise UsageError(f"checkpoint={path} is neither a .safetensors file nor a folder with such files")
    files: dict[str, Path] = {}
    for item in found:
        try:
            with safe_open(item, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UsageError(f"the checkpoint {item} cannot be read: {error}") from error
        for name in names:
            if name in files:
                raise UsageError(f"tensor {name} is both in {files[name].name} and in {item.name} of {path}; keep one")
            files[name] = item
    return Checkpoint(path, files)


@dataclass
class TrainedGates:
    """A checkpoint while it is put into a program: `names` are its tensors by the program's names.

    `queries` collects weights that were split, by the program's names, `gates` what was split off them.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    mode: str
    rows: Rows
    queries: dict[str, torch.Tensor] = field(default_factory=dict)
    gates: dict[str, GateWeights] = field(default_factory=dict)

    def gate(self, editor: GraphEditor, attention: Attention, layout: Layout) -> GateWeights | str:
        """The weights of this attention's gate, or a clause that says why it has none.

        Raises UsageError where the checkpoint's rows are neither those of queries nor those of queries and gates.
        """
        product = attention.projection
        if product.target not in WEIGHTS:
            return f"its queries are made by {describe(product)}, whose weight has no rows for gates"
        node = argument(product, WEIGHTS[product.target])
        old = editor.constant_value(node)
        if old is None:
            return f"the weight of {product.name} is no constant of its graph"
        name = full_name(editor.path, str(node.target))
        if name in self.gates:
            return self.gates[name]
        transposed = product.target is not aten.linear.default
        weight = self._read(name, old)
        if weight.shape == old.shape:
            return f"{self.names[name]} has no rows of gates"
        groups = self._groups(editor, attention, layout)
        per_head = layout.width + (layout.width if self.mode == "elementwise" else 1)
        expected = [layout.heads * per_head, old.shape[0 if transposed else 1]]
        if transposed:
            weight = weight.t()
        if list(weight.shape) != expected:
            raise UsageError(
                f"{self.names[name]} of {self.checkpoint.path} is {list(weight.shape)}, where the program's queries "
                f"{[layout.heads * layout.width, expected[1]]} with mode={self.mode} gates take {expected}"
            )
        queries, gates = split_rows(weight, groups, layout.heads // groups * layout.width)
        self.queries[name] = queries.t().contiguous() if transposed else queries
        bias = self._bias(product, name, groups, layout, expected[0], editor)
        self.gates[name] = torch.nn.Parameter(gates, old.requires_grad), bias
        return self.gates[name]

    def _groups(self, editor: GraphEditor, attention: Attention, layout: Layout) -> int:
        if self.rows == "per-head":
            return layout.heads
        keys = attention.keys
        made = keys.meta["val"].shape[-1] if keys is not None and keys.target in WEIGHTS else 0
        groups = made // layout.width if isinstance(made, int) else 0
        if not groups or made % layout.width or layout.heads % groups:
            where = editor.full_name(attention.anchor)
            raise UsageError(
                f"the keys of {where} do not come from one product with a row for each channel of a group of its "
                f"{layout.heads} heads, as rows=per-group needs"
            )
        return groups

    def _bias(
        self, product: Node, name: str, groups: int, layout: Layout, rows: int, editor: GraphEditor
    ) -> torch.nn.Parameter | None:
        """Split the bias of the query projection too, where the checkpoint has one; the gate's part."""
        source = self.names[name].rpartition(".")[0] + ".bias"
        if source not in self.checkpoint.files:
            return None
        node = argument(product, "bias" if product.target is aten.linear.default else "self")
        old = editor.constant_value(node)
        value = self.checkpoint.read(source)
        if old is None or list(value.shape) != [rows]:
            wanted = "no bias for its queries" if old is None else f"one of {list(old.shape)}, with gates {[rows]}"
            raise UsageError(f"{source} of {self.checkpoint.path} is {list(value.shape)}, the program has {wanted}")
        queries, gates = split_rows(value.to(old.dtype), groups, layout.heads // groups * layout.width)
        self.queries[full_name(editor.path, str(node.target))] = queries
        return torch.nn.Parameter(gates, old.requires_grad)

    def _read(self, name: str, old: torch.Tensor) -> torch.Tensor:
        if name not in self.names:
            raise UsageError(
                f"the checkpoint {self.checkpoint.path} has no tensor for the program's {name} {list(old.shape)}; "
                "put it in before passes that make weights of their own"
            )
        return self.checkpoint.read(self.names[name]).to(old.dtype)

    def load(self, program: Program, added: Iterable[str]) -> list[str]:
        """Give every weight but those `added` the checkpoint's value, in the program's types; what to remark.

        Buffers that the checkpoint lacks stay. Raises UsageError for a parameter that it lacks, or another shape.
        """
        module, kept = program.graph_module, set(added)
        trained = dict(module.named_parameters())
        for name, old in {**trained, **dict(module.named_buffers())}.items():
            if name in kept or (name not in trained and name not in self.names):
                continue
            value = self.queries[name] if name in self.queries else self._read(name, old)
            if value.shape != old.shape:
                raise UsageError(
                    f"{self.names[name]} of {self.checkpoint.path} is {list(value.shape)}, where the program's {name} "
                    f"is {list(old.shape)}"
                )
            set_attribute(module, name, torch.nn.Parameter(value, old.requires_grad) if name in trained else value)
        used = set(self.names.values())
        unused = sorted(name for name in self.checkpoint.files if name not in used)
        return (
            [f"{len(unused)} tensors of the checkpoint are not in the program: {', '.join(unused)}"] if unused else []
        )


def split_rows(rows: torch.Tensor, groups: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [groups x (queries + gates), ...] as queries [groups x queries, ...] and gates [groups x gates, ...]."""
    parts = rows.unflatten(0, (groups, -1))
    first, second = parts[:, :queries], parts[:, queries:]
    return first.flatten(0, 1).contiguous(), second.flatten(0, 1).contiguous()


def trained_gates(path: str, program: Program, mode: str, rows: Rows) -> TrainedGates:
    """The checkpoint at `path` for a program; names are matched by that of the first attention's query projection.

    Raises UsageError where the checkpoint cannot be read, and where the program has no attention to begin with.
    """
    checkpoint = open_checkpoint(path)
    ours = [name for name, _ in (*program.graph_module.named_parameters(), *program.graph_module.named_buffers())]
    for place, _ in program.graphs():
        for found in find_attentions(program, place):
            if isinstance(found, Attention) and found.projection.target in WEIGHTS:
                node = argument(found.projection, WEIGHTS[found.projection.target])
                names = matching_names(ours, checkpoint.files, full_name(place, str(node.target)))
                return TrainedGates(checkpoint, names, mode, rows)
    raise UsageError(f"the program has no attention that can take the gates of {path}; leave checkpoint out")


def matching_names(ours: Iterable[str], theirs: Iterable[str], anchor: str) -> Mapping[str, str]:
    """The names of `theirs` by those of `ours`: the same but for one prefix of each, such as "model.".

    `theirs` that have the most last parts in common with `anchor` give the prefixes; those are taken with which most
    names are found. Raises UsageError where two choices find as many.
    """
    ours, theirs = list(ours), set(theirs)
    longest = max((_in_common(anchor, other) for other in theirs), default=0)
    prefixes = {_prefixes(anchor, other, longest) for other in theirs if _in_common(anchor, other) == longest}
    choices: dict[str, dict[str, str]] = {}
    for own, other in sorted(prefixes):
        pairs = ((name, other + name.removeprefix(own)) for name in ours if name.startswith(own))
        choices[other] = {name: found for name, found in pairs if found in theirs}
    most = max(map(len, choices.values()), default=0)
    best = [other for other, found in choices.items() if len(found) == most]
    if len(best) > 1:
        left, right = (choices[other].get(anchor) for other in best[:2])
        raise UsageError(f"the program's {anchor} may be {left} or {right} of the checkpoint; take one part out")
    return choices[best[0]] if best else {}


def _in_common(left: str, right: str) -> int:
    """How many last parts of two dotted names are the same."""
    pairs = zip(reversed(left.split(".")), reversed(right.split(".")), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(left.count("."), right.count(".")) + 1)


def _prefixes(left: str, right: str, common: int) -> tuple[str, str]:
    """What is left of two names without their last parts: "model." of "model.head.weight" without two."""
    left, right = ("".join(f"{part}." for part in name.split(".")[: -common or None]) for name in (left, right))
    return left, right
