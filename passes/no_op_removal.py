"""Remove operators whose result equals their input bit for bit.

Before: y = clone(x); z = view(y, same shape)        After: x in the place of both

Copies and aliases, casts to the same type, reshapes and expands to the same shape, slices of the full range, identity
permutations and pairs that undo each other, padding by nothing, dropout in evaluation, x * 1, x / 1, x - 0, and x + 0
on integers. Of several reshapes in a row one stays, and one in the place of an index by constants that reads every
element in order. Declines x + 0.0 on floats (it turns -0.0 into 0.0) and copies without which an output would share
memory with an input, a weight or another output. Symbolic sizes count as equal when their expressions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.aliasing import why_output_needs_copy
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument, arguments
from graphopt.program import Program
from graphopt.propagate import shape_key

aten = torch.ops.aten


@dataclass(frozen=True)
class NoOpRemoval(Pass):
    """Remove operators whose result equals their input bit for bit."""

    name = "no-op-removal"
    measured = False
    unrecorded = "an operator of two tensors changes its input, for all that is known"

    def starts_at(self) -> frozenset[Any]:
        return frozenset(CASES)

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                if node.target in CASES:
                    self._try(editor, node)
        return edit.finish()

    def _try(self, editor: GraphEditor, node: Node) -> None:
        found = CASES[node.target](node)
        if isinstance(found, str):
            editor.decline(self.name, node, found)
            return
        if found is None or not _same_type(node, found):
            if (reshaped := _reshaped(editor, node)) is not None:
                self._reshape(editor, node, *reshaped)
                return
            reason = what_changes(node)
            if reason is not None:
                editor.near_miss(self.name, node, reason, 1, 2)
            return
        reason = why_output_needs_copy(node, found) if node.target in COPIES else None
        if reason is not None:
            editor.decline(self.name, node, reason)
        else:
            editor.replace(self.name, [node], lambda builder: [found])

    def _reshape(self, editor: GraphEditor, node: Node, source: Node, sizes: Any) -> None:
        reason = why_output_needs_copy(node, source) if node.target in COPIES else None
        if reason is not None:
            editor.decline(self.name, node, reason)
            return
        target: Any = aten.view.default if node.target in COPIES else node.target

        def build(builder: Builder) -> list[Node]:
            return [source if _same_type(node, source) else builder.call(target, source, sizes)]

        editor.replace(self.name, [node], build)


def _reshaped(editor: GraphEditor, node: Node) -> tuple[Node, Any] | None:
    """What an operator only gives another shape, with fewer reshapes on the way, and the sizes of that shape."""
    source = _source(node)
    if source is None:
        return None
    if node.target is aten.index.Tensor:
        sizes = list(node.meta["val"].shape)
        return (source, sizes) if _reads_all_in_order(editor, node, source) else None
    if node.target not in RESHAPES:
        return None
    first = source
    while first.target is aten.view.default or first.target is node.target:
        first = first.args[0]  # type: ignore[assignment]
    return None if first is source else (first, node.args[1])


def _reads_all_in_order(editor: GraphEditor, node: Node, source: Node) -> bool:
    value, result = source.meta["val"], node.meta["val"]
    given: Any = node.args[1]
    # A symbolic size must not be compared: the comparison would fix it.
    if not all(isinstance(size, int) for size in (*value.shape, *result.shape)) or not value.is_contiguous():
        return False
    if value.numel() > MOST_ELEMENTS or value.numel() != result.numel():
        return False
    indices = [editor.constant_value(index) for index in given]
    if any(index is not None and held is None for index, held in zip(given, indices, strict=True)):
        return False
    places = torch.arange(value.numel())
    return torch.equal(aten.index.Tensor(places.view(value.shape), indices).flatten(), places)


def what_changes(node: Node) -> str | None:
    """How the result of an operator differs from its input, in short; None where it is computed from two tensors."""
    source, operands = _source(node), arguments(node)[:2]
    if source is None or (len(operands) == 2 and isinstance(operands[1], Node) and node.target in COPIES):
        return None
    own, other = node.meta["val"], source.meta["val"]
    for what in ("dtype", "device"):
        if getattr(own, what) != getattr(other, what):
            return f"the {what} changes from {getattr(other, what)} to {getattr(own, what)}"
    if shape_key(own) != shape_key(other):
        return f"the shape changes from {list(other.shape)} to {list(own.shape)}"
    if node.target in PERMUTATIONS:
        return f"the order of axes changes to {_order(node)}"
    return f"{node.target} with {operands[1] if len(operands) == 2 else 'its arguments'} changes values"


def _same_type(node: Node, source: Node) -> bool:
    own, other = node.meta["val"], source.meta["val"]
    return own.dtype == other.dtype and own.device == other.device and shape_key(own) == shape_key(other)


def _source(node: Node) -> Node | None:
    """The first argument; the caller checks that type, device and shape are the same, which is all it takes."""
    return node.args[0] if node.args and isinstance(node.args[0], Node) else None


def _dropout(node: Node) -> Node | None:
    return None if argument(node, "train") and argument(node, "p") != 0 else _source(node)


def _permute(node: Node) -> Node | None:
    source = _source(node)
    if source is None:
        return None
    order = _order(node)
    if order == list(range(len(order))):
        return source
    inner = source.args[0] if source.target in PERMUTATIONS else None
    if isinstance(inner, Node) and [_order(source)[axis] for axis in order] == list(range(len(order))):
        return inner
    return None


def _order(node: Node) -> list[int]:
    """Axis `i` of the result is axis `order[i]` of the input."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in argument(node, "dims")]
    if node.target is aten.t.default:
        return order[::-1]
    if rank:
        first, second = int(argument(node, "dim0")) % rank, int(argument(node, "dim1")) % rank
        order[first], order[second] = order[second], order[first]
    return order


def _pad(node: Node) -> Node | None:
    return None if any(argument(node, "pad")) else _source(node)


def _times_one(node: Node) -> Node | None:
    return _source(node) if _is_number(arguments(node)[1], 1) else None


def _minus_zero(node: Node) -> Node | str | None:
    return _sum_with_zero(node, math.copysign(1.0, -1.0))


def _plus_zero(node: Node) -> Node | str | None:
    return _sum_with_zero(node, math.copysign(1.0, 1.0))


def _sum_with_zero(node: Node, sign: float) -> Node | str | None:
    """x + z for a zero z is x unless both are floats and x may be -0.0 while z is +0.0."""
    source, zero = _source(node), arguments(node)[1]
    if source is None or not _is_number(zero, 0):
        return None
    factor = argument(node, "alpha")
    if not _is_number(factor, 1):
        return None
    value = node.meta["val"]
    if value.dtype.is_floating_point and sign * math.copysign(1.0, zero) > 0:
        return f"adding {zero} to {value.dtype} turns -0.0 into 0.0"
    return None if value.dtype.is_complex else source


def _is_number(value: Any, wanted: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted


PERMUTATIONS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})
COPIES = frozenset(
    {aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.repeat.default}
    | {aten.pad.default, aten.constant_pad_nd.default, aten.index.Tensor}
    | {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar}
    | {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
)
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
MOST_ELEMENTS = 1 << 20  # that an index is followed over
CASES: dict[Any, Callable[[Node], Node | str | None]] = {
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default), _source),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device), _source),
    **dict.fromkeys(RESHAPES, _source),
    aten.index.Tensor: lambda node: None,
    **dict.fromkeys((aten.expand.default, aten.repeat.default, aten.slice.Tensor), _source),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints), _source),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), _dropout),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _times_one),
    aten.pow.Tensor_Scalar: _times_one,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _plus_zero),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _minus_zero),
}
