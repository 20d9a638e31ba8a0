"""Make one linear of several that read the same input.

Before: q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv)
After:  q, k, v = split(linear(x, cat(wq, wk, wv), cat(bq, bk, 0)), [nq, nk, nv], -1)

Linears are merged in order of execution. Rows of a product do not depend on each other: results differ by rounding
at most. Declines a linear that leaves a branch, or whose weight is no constant or differs from the first one's in type
or row length, and a group that would hold more than `max_bytes` twice because other nodes go on reading the old
weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt.aliasing import output_reached
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.program import Program, get_attribute

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Make one linear of several that read the same input."""

    name = "merge-linears"
    max_bytes: int = 1 << 20

    def starts_at(self) -> frozenset[Any]:
        return frozenset({aten.linear.default})

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        readers = count_readers(edit.program)
        for editor in edit.graphs():
            groups: dict[object, list[Node]] = {}
            for node in editor.nodes():
                if node.target is aten.linear.default:
                    groups.setdefault(node.args[0], []).append(node)
            for group in groups.values():
                self._try(editor, group, readers)
        return edit.finish()

    def _try(self, editor: GraphEditor, group: list[Node], readers: dict[int, int]) -> None:
        if len(group) < 2:
            editor.decline(self.name, group[0], "no other linear reads the same input")
            return
        members = list(self._members(editor, group))
        if len(members) < 2:
            if members:
                editor.decline(self.name, members[0], "no other linear of this input has a weight that fits")
            return
        twice = bytes_kept(editor, members, readers)
        if twice > self.max_bytes:
            reason = f"{twice} bytes of old weights would stay beside the merged one, over max-bytes={self.max_bytes}"
            for node in members:
                editor.decline(self.name, node, reason)
            return
        weight, bias = merged_weights(editor, members)
        sizes = [int(node.meta["val"].shape[-1]) for node in members]

        def build(builder: Builder) -> list[Node]:
            merged = builder.call(aten.linear.default, members[0].args[0], weight, bias)
            parts = builder.call(aten.split_with_sizes.default, merged, sizes, -1)
            return [builder.call(operator.getitem, parts, index) for index in range(len(sizes))]

        editor.replace(self.name, members, build)

    def _members(self, editor: GraphEditor, group: list[Node]) -> Iterator[Node]:
        """Those of `group` that have constant weights of the type and row length of the first such."""
        wanted: tuple[torch.dtype, int] | None = None
        for node in group:
            weight, bias = editor.constant_value(argument(node, "weight")), argument(node, "bias")
            if editor.path and output_reached(node) is not None:
                editor.decline(self.name, node, "it leaves its branch, whose other side has another layout")
            elif weight is None or (bias is not None and editor.constant_value(bias) is None):
                editor.decline(self.name, node, f"the {'weight' if weight is None else 'bias'} is no constant")
            elif weight.dim() != 2 or not weight.dtype.is_floating_point:
                editor.decline(
                    self.name, node, f"the weight is {weight.dtype} with {weight.dim()} axes, not float with 2"
                )
            elif wanted is not None and (weight.dtype, weight.shape[1]) != wanted:
                found, first = f"{weight.dtype} with K={weight.shape[1]}", f"{wanted[0]} with K={wanted[1]}"
                editor.decline(self.name, node, f"the weight is {found}, the first one is {first}")
            else:
                wanted = weight.dtype, weight.shape[1]
                yield node


def count_readers(program: Program) -> dict[int, int]:
    """How many nodes read each weight, by the address of its storage."""
    found: dict[int, int] = {}
    for _, module in program.graphs():
        for node in module.graph.find_nodes(op="get_attr"):
            address = _address(module, node)
            found[address] = found.get(address, 0) + len(node.users)
    return found


def _address(module: GraphModule, node: Node) -> int:
    value = get_attribute(module, str(node.target))
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else 0


def bytes_kept(editor: GraphEditor, members: list[Node], readers: dict[int, int]) -> int:
    """Bytes of the members' weights that something else reads, or that the merged weight repeats."""
    merged: dict[int, int] = {}
    total, freed = 0, 0
    for node in members:
        weight = editor.constant_value(argument(node, "weight"))
        assert weight is not None
        total += weight.nbytes
        address = weight.untyped_storage().data_ptr()
        merged[address] = merged.get(address, 0) + 1
        freed += weight.nbytes if merged[address] == readers[address] else 0
    return total - freed


def merged_weights(editor: GraphEditor, members: list[Node]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of all weights, and of all biases where there is one (zeros for members without)."""
    weights = [editor.constant_value(argument(node, "weight")) for node in members]
    biases = [editor.constant_value(argument(node, "bias")) for node in members]
    pairs = [(weight, bias) for weight, bias in zip(weights, biases, strict=True) if weight is not None]
    weight = torch.cat([weight.detach() for weight, _ in pairs])
    trained = any(isinstance(weight, torch.nn.Parameter) for weight, _ in pairs)
    bias = None
    if any(bias is not None for _, bias in pairs):
        rows = [weight.new_zeros(weight.shape[0]) if bias is None else bias.detach() for weight, bias in pairs]
        bias = torch.cat(rows)
    if not trained:
        return weight, bias
    needs = any(weight.requires_grad for weight, _ in pairs)
    return torch.nn.Parameter(weight, needs), None if bias is None else torch.nn.Parameter(bias, needs)
