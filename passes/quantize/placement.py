"""Which operators read codes, and which values share a scale.

Layers, which are products of a value with a weight or with another value, always read codes. So do operators between
layers, where nobody else reads their result, for then the value stays in codes all the way:

- movement of data (views, transpositions, slices), max pooling and concatenation, whose result has the scale of what
  they read, and so is exact in codes, unless a float kernel made that;
- residual sums of two values of one shape, and average pools, each with a scale of its own for the result.

A clamp such as relu right behind a product, a sum or a pool belongs to it: the code is taken behind it. A residual sum
that a norm reads, as in transformers, stays float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import GraphEditor
from graphopt.matcher import argument
from graphopt.passes.mixed_precision import VIEWS
from graphopt.passes.scale_folding import PRODUCTS
from graphopt.propagate import shape_key

aten = torch.ops.aten

OPERANDS: Mapping[Any, tuple[str, ...]] = {
    **{target: (product.input, product.weight) for target, product in PRODUCTS.items()},
    aten.bmm.default: ("self", "mat2"),
}
CONVOLUTIONS = frozenset(target for target, product in PRODUCTS.items() if product.channels != -1)
CLAMPS = frozenset({aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.relu6.default})
AVERAGES = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim})
MOVES = VIEWS | {aten.max_pool2d.default, aten.max_pool1d.default, aten.cat.default}
_ADD = aten.add.Tensor
STARTS = frozenset({*OPERANDS, *AVERAGES, _ADD})
LONGEST_SUM = 2**31 // (255 * 127)  # products of the largest codes that int32 surely holds


@dataclass(frozen=True)
class Layer:
    """A product that may read codes: `values` are computed operands, `weight` is one that is constant, or None."""

    node: Node
    values: tuple[Node, ...]
    weight: Node | None


@dataclass(frozen=True)
class Refused:
    """An operator that stays float32 though its type is one that could read codes, and why."""

    node: Node
    reason: str


@dataclass(frozen=True)
class Placement:
    """`layers` by node; `readers` have the operands of every operator that reads codes, in order of execution.

    `roots` maps each value that gets codes to the one among those that share its scale that stands for them.
    """

    layers: Mapping[Node, Layer]
    readers: Mapping[Node, tuple[Node, ...]]
    roots: Mapping[Node, Node]
    refused: tuple[Refused, ...] = ()

    def observed(self) -> Iterator[tuple[Node, Node]]:
        """Values whose numbers decide a range, each with its root; what is only moved has no others."""
        for value, root in self.roots.items():
            if value not in self.readers or value.target not in MOVES:
                yield value, root


@dataclass(frozen=True)
class Rules:
    """What may be placed: `floats(node)` is why an operator stays float32, or None.

    `weighted` is whether layers with a constant weight read codes, `pairs` those of two computed values, and `between`
    what stands between layers. `whole_sums` is whether both operands of a residual sum do, or all but one that a layer
    makes and can add on its own.
    """

    floats: Callable[[GraphEditor, Node], str | None]
    weighted: bool = True
    pairs: bool = True
    between: bool = True
    whole_sums: bool = True


def find_layers(editor: GraphEditor, rules: Rules) -> tuple[dict[Node, Layer], list[Refused]]:
    """Every float32 product that may read codes, in order, and those that may not."""
    found: dict[Node, Layer] = {}
    refused = []
    for node in editor.nodes():
        if node.target not in OPERANDS or not _is_float(node):
            continue
        layer = _layer(editor, node)
        reason = _defect(editor, layer) or rules.floats(editor, node)
        if reason is None:
            found[node] = layer
        else:
            refused.append(Refused(node, reason))
    return found, refused


def _layer(editor: GraphEditor, node: Node) -> Layer:
    operands = [argument(node, name) for name in OPERANDS[node.target]]
    weight = operands[1] if editor.constant_value(operands[1]) is not None else None
    return Layer(node, tuple(item for item in operands if item is not weight), weight)


def _defect(editor: GraphEditor, layer: Layer) -> str | None:
    node, weight = layer.node, layer.weight
    if any(is_dequantized(operand) for operand in node.all_input_nodes):
        return "an operand is quantized already"
    if any(editor.constant_value(value) is not None for value in layer.values):
        return "it multiplies a constant from the left"
    if weight is None:
        if node.target in PRODUCTS and node.target not in (aten.mm.default, aten.matmul.default):
            return f"its weight, {argument(node, OPERANDS[node.target][1]).name}, is computed"
        if any(value.meta["val"].dim() < 2 for value in layer.values):
            return "an operand has one axis"
        size: Any = layer.values[-1].meta["val"].shape[-2]
    else:
        shape = weight.meta["val"].shape
        if len(shape) < 2 or (node.target not in CONVOLUTIONS and len(shape) > 2):
            return f"its weight has {len(shape)} axes"
        size = weight.meta["val"].numel() // shape[PRODUCTS[node.target].outputs]
    if isinstance(size, int) and size > LONGEST_SUM:
        return f"a sum of {size} products may exceed 32 bits, which surely hold {LONGEST_SUM}"
    return None


def place(editor: GraphEditor, rules: Rules) -> Placement:
    """Which operators of one graph read codes."""
    layers, refused = find_layers(editor, rules)
    reads: dict[Node, tuple[Node, ...]] = {
        node: layer.values
        for node, layer in layers.items()
        if (rules.pairs if layer.weight is None else rules.weighted)
    }
    if rules.between:
        for node in reversed(list(editor.nodes())):
            operands = _between(editor, node, reads, rules)
            if operands and rules.floats(editor, node) is None:
                reads[node] = operands
        _keep_moves_of_codes(editor, reads)
    order = {node: number for number, node in enumerate(editor.graph.nodes)}
    readers = {node: reads[node] for node in sorted(reads, key=order.__getitem__)}
    return Placement(layers, readers, _share(readers), tuple(refused))


def _keep_moves_of_codes(editor: GraphEditor, reads: dict[Node, tuple[Node, ...]]) -> None:
    """Leave movement of what a float kernel makes to floats: codes are as well taken behind it."""
    for node in editor.nodes():
        if node in reads and node.target in MOVES and not any(unclamped(value) in reads for value in reads[node]):
            del reads[node]


def _between(
    editor: GraphEditor, node: Node, reads: Mapping[Node, tuple[Node, ...]], rules: Rules
) -> tuple[Node, ...] | None:
    """What the operator reads as codes where all that read its result do, too."""
    if node.op != "call_function" or node in reads or not _is_float(node):
        return None
    end = node if node.target in MOVES else clamped(node)
    if not end.users or any(user not in reads or end not in reads[user] for user in end.users):
        return None
    values = _moved_or_summed(node)
    computed = [value for value in values if editor.constant_value(value) is None and _is_float(value)]
    if not values or len(computed) < len(values) or any(map(is_dequantized, values)):
        return None
    if node.target is not _ADD:
        return values
    sources = [unclamped(value) for value in values]
    if not any(source.target in OPERANDS or source.target in (_ADD, *AVERAGES) for source in sources):
        return None
    if rules.whole_sums:
        return values
    added = [value for value in values if value.target in OPERANDS and len(value.users) == 1]
    return tuple(value for value in values if value not in added[:1])


def _moved_or_summed(node: Node) -> tuple[Node, ...]:
    """The operands of an operator that may stand between layers; none where it may not."""
    first = node.args[0] if node.args else None
    if node.target is aten.cat.default:
        return tuple(first) if isinstance(first, (list, tuple)) else ()
    if node.target in MOVES:
        return (first,) if isinstance(first, Node) else ()
    if node.target in AVERAGES:
        return (first,) if isinstance(first, Node) and _is_map(first) else ()
    if node.target is _ADD:
        pair = node.args[:2]
        if not all(isinstance(item, Node) for item in pair) or node.kwargs.get("alpha", 1) != 1:
            return ()
        left, right = pair
        same = shape_key(left.meta["val"]) == shape_key(right.meta["val"])  # type: ignore[union-attr]
        return tuple(dict.fromkeys(pair)) if same else ()  # type: ignore[arg-type]
    return ()


def clamped(node: Node) -> Node:
    """The clamp that alone reads `node`, or `node`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in CLAMPS else node


def unclamped(node: Node) -> Node:
    """What a clamp reads, or `node`."""
    return node.all_input_nodes[0] if node.target in CLAMPS else node


def is_dequantized(node: Any) -> bool:
    """Whether it stands for codes already."""
    name = getattr(getattr(node, "target", None), "_schema", None)
    return getattr(name, "name", "") in ("graphopt::dequantize", "graphopt::dequantize_lookup")


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _is_map(node: Node) -> bool:
    """Whether it has axes of space, over which averages are taken."""
    return bool(node.meta["val"].dim() == 4)


def _share(readers: Mapping[Node, Sequence[Node]]) -> dict[Node, Node]:
    """For each value with codes the first of those that have its scale."""
    roots: dict[Node, Node] = {}

    def root(value: Node) -> Node:
        while roots.setdefault(value, value) is not value:
            value = roots[value]
        return value

    for node, operands in readers.items():
        for value in operands:
            root(value)
        if node.target in MOVES:
            first = root(operands[0])
            for other in (*operands[1:], node):
                roots[root(other)] = first
    return {value: root(value) for value in roots}
