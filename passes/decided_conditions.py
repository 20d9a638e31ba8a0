"""Replace conditions that come out the same for every input, and what they decide.

Before: m = and(ge(arange(seq), 0), padding)        After: m = expand(padding)
Before: y = attention(q, k, v, a mask of true, or of zeros)    After: y = attention(q, k, v)

Exporters write masks as "this position is valid and not padding", with the first part true by construction. Left in,
it makes a padding mask [B, 1, 1, S] look like one that differs from row to row, [B, 1, S, S]. Integer ranges are
followed from position counters and constants through sums, products and reshapes; a comparison with a number that the
range decides is a constant, and so are conjunctions and disjunctions with it. Declines comparisons that the range
leaves open.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.near_miss import describe
from graphopt.program import Program
from graphopt.propagate import shape_key

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
Range = tuple[float, float]

MOST_ELEMENTS = 1 << 20  # of a constant that is looked through


@dataclass(frozen=True)
class DecidedConditions(Pass):
    """Replace conditions that come out the same for every input, and what they decide."""

    name = "decided-conditions"
    measured = False

    def starts_at(self) -> frozenset[Any]:
        return frozenset(COMPARISONS) | CONJUNCTIONS | DISJUNCTIONS | {ATTENTION}

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            known = _Known(editor)
            for node in editor.nodes():
                if node.target in COMPARISONS:
                    self._compare(editor, node, known)
                elif node.target in CONJUNCTIONS or node.target in DISJUNCTIONS:
                    self._combine(editor, node, known)
                elif node.target is ATTENTION and argument(node, "attn_mask") is not None:
                    self._unmask(editor, node, known)
        return edit.finish()

    def _compare(self, editor: GraphEditor, node: Node, known: _Known) -> None:
        source, number = node.args[:2]
        found = known.range(source)
        if found is None or not isinstance(number, (int, float)) or math.isnan(number):
            what = f"nothing is known of the values of {describe(source)}"
            reason = what if found is None else f"it compares with {number}, which is no plain number"
            editor.near_miss(self.name, node, reason, 1, 2)
            return
        outcome = COMPARISONS[node.target](*found, number)
        if outcome is None:
            low, high = (int(end) if math.isfinite(end) else end for end in found)
            editor.decline(self.name, node, f"values from {low} to {high} do not decide a comparison with {number}")
            return
        editor.replace(self.name, [node], lambda builder: [_flag(builder, source, outcome)])

    def _combine(self, editor: GraphEditor, node: Node, known: _Known) -> None:
        if node.meta["val"].dtype != torch.bool:
            editor.near_miss(self.name, node, f"it works on {node.meta['val'].dtype}, not on truth values", 1, 2)
            return
        left, right = node.args[:2]
        for flag, other in ((left, right), (right, left)):
            outcome = known.constant(flag)
            if outcome is None or not isinstance(flag, Node) or not isinstance(other, Node):
                continue
            if outcome == (node.target in CONJUNCTIONS):  # true and x, false or x
                editor.replace(self.name, [node], _Spread(node, other))
            elif shape_key(flag.meta["val"]) == shape_key(node.meta["val"]):
                editor.replace(self.name, [node], _Spread(node, flag))
            else:
                editor.decline(self.name, node, f"{flag.name} decides it, but has another shape than the result")
            return
        editor.near_miss(self.name, node, f"neither {left} nor {right} is known to be the same everywhere", 1, 2)

    def _unmask(self, editor: GraphEditor, node: Node, known: _Known) -> None:
        mask = argument(node, "attn_mask")
        held = editor.constant_value(mask)
        zeros = held is not None and held.is_floating_point() and held.numel() <= MOST_ELEMENTS and not held.any()
        if not zeros and known.constant(mask) is not True:
            editor.near_miss(self.name, node, f"{describe(mask)} may leave something out", 1, 2)
            return

        def build(builder: Builder) -> list[Node]:
            given = [None if item is mask else item for item in node.args]
            options = {name: value for name, value in node.kwargs.items() if value is not mask}
            return [builder.call(ATTENTION, *given, **options)]

        editor.replace(self.name, [node], build)


def _flag(builder: Builder, like: Any, outcome: bool) -> Node:
    return builder.call(aten.full_like.default, like, outcome, dtype=torch.bool)


@dataclass(frozen=True)
class _Spread:
    """Builds `value` in the shape of `node`; sizes that are not plain are read off the operand that has them."""

    node: Node
    value: Node

    def __call__(self, builder: Builder) -> list[Node]:
        if shape_key(self.value.meta["val"]) == shape_key(self.node.meta["val"]):
            return [self.value]
        sizes = [self.size(builder, axis) for axis in range(self.node.meta["val"].dim())]
        return [builder.call(aten.expand.default, self.value, sizes)]

    def size(self, builder: Builder, axis: int) -> Any:
        whole = self.node.meta["val"].shape
        if isinstance(whole[axis], int):
            return whole[axis]
        for operand in self.node.all_input_nodes:
            own = operand.meta["val"].shape
            position = axis - (len(whole) - len(own))
            if (
                position >= 0
                and not isinstance(own[position], int)
                and own[position].node.expr == whole[axis].node.expr
            ):
                return builder.call(aten.sym_size.int, operand, position)
        raise AssertionError("an axis of a broadcast result is an axis of an operand")


class _Known:
    """What is known of values, remembered: integer ranges, and constants among the flags."""

    def __init__(self, editor: GraphEditor) -> None:
        self._editor = editor
        self._ranges: dict[Node, Range | None] = {}

    def constant(self, value: Any) -> bool | None:
        """True or False where every element of a flag is."""
        if not isinstance(value, Node) or value.meta["val"].dtype != torch.bool:
            return None
        found = self.range(value)
        return bool(found[0]) if found is not None and found[0] == found[1] else None

    def range(self, value: Any) -> Range | None:
        """Bounds of all elements of an integer or bool tensor, both included."""
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return None
        if value.meta["val"].is_floating_point() or value.meta["val"].is_complex():
            return None
        if value not in self._ranges:
            rule, held = RANGES.get(value.target), self._editor.constant_value(value)
            self._ranges[value] = _held(held) if held is not None else None if rule is None else rule(self, value)
        return self._ranges[value]


def _held(tensor: torch.Tensor) -> Range | None:
    if not 0 < tensor.numel() <= MOST_ELEMENTS:
        return None
    least, most = torch.aminmax(tensor)
    return int(least), int(most)


def _filled(position: int) -> Callable[[_Known, Node], Range | None]:
    def find(known: _Known, node: Node) -> Range | None:
        number = node.args[position]
        return (number, number) if isinstance(number, (int, bool)) else None

    return find


def _same(known: _Known, node: Node) -> Range | None:
    return known.range(node.args[0])


def _count(known: _Known, node: Node) -> Range | None:
    """arange from a plain start in plain positive steps; the end may be any size."""
    start, step = (0, 1) if len(node.args) == 1 else (node.args[0], node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(start, int) or not isinstance(step, int) or step <= 0:
        return None
    end = node.args[0] if len(node.args) == 1 else node.args[1]
    return start, float(max(start, end - 1)) if isinstance(end, int) else math.inf


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Callable[[_Known, Node], Range | None]:
    """With a plain number; a narrow type could wrap around, so only int64 is followed."""

    def find(known: _Known, node: Node) -> Range | None:
        found, number = known.range(node.args[0]), node.args[1]
        plain = isinstance(number, int) and node.kwargs.get("alpha", 1) == 1
        if found is None or not plain or node.meta["val"].dtype != torch.int64:
            return None
        ends = [combine(end, number) for end in found]
        return None if any(math.isnan(end) for end in ends) else (min(ends), max(ends))

    return find


RANGES: dict[Any, Callable[[_Known, Node], Range | None]] = {
    aten.arange.default: _count,
    aten.arange.start: _count,
    aten.arange.start_step: _count,
    aten.full.default: _filled(1),
    aten.full_like.default: _filled(1),
    aten.new_full.default: _filled(2),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda known, node: (1, 1)),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda known, node: (0, 0)),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim), _same),
    **dict.fromkeys((aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default), _same),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.alias.default), _same),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(operator.add)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(operator.sub)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(operator.mul)),
}


def _decide(never: Callable[..., bool], always: Callable[..., bool]) -> Callable[[float, float, float], bool | None]:
    def outcome(low: float, high: float, number: float) -> bool | None:
        return True if always(low, high, number) else False if never(low, high, number) else None

    return outcome


COMPARISONS: dict[Any, Callable[[float, float, float], bool | None]] = {
    aten.ge.Scalar: _decide(lambda low, high, n: high < n, lambda low, high, n: low >= n),
    aten.gt.Scalar: _decide(lambda low, high, n: high <= n, lambda low, high, n: low > n),
    aten.le.Scalar: _decide(lambda low, high, n: low > n, lambda low, high, n: high <= n),
    aten.lt.Scalar: _decide(lambda low, high, n: low >= n, lambda low, high, n: high < n),
    aten.eq.Scalar: _decide(lambda low, high, n: n < low or n > high, lambda low, high, n: low == high == n),
    aten.ne.Scalar: _decide(lambda low, high, n: low == high == n, lambda low, high, n: n < low or n > high),
}
CONJUNCTIONS = frozenset({aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default})
DISJUNCTIONS = frozenset({aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default})
