"""Programs that say what they round, as programs that compute with the codes.

Before: y = quantize(linear(dequantize(x), dequantize(w), b))        After: y = qlinear(x, w, b)

Fused are linears, matrix products and convolutions of codes by constant weights with bias, residual, activation and
clip, with or without a quantize behind them; sums, products, quotients and matrix products of two activations; sums and
means over axes and of windows; the larger or smaller of two, and positions of what is sorted; chains of element-wise
operators on one of them; and everything that only moves elements, through which dequantize is pushed until it meets a
quantize or a product. Rewritten codes differ from the program's by at most one, where the number before rounding lies
within float32's error of a half; moves, pairs, positions and tables are exact.

Signed codes of activations become unsigned ones, exactly: the products of x86 take them so.

Softmax and norms over the last axis stay between dequantize and quantize, which one kernel computes with them. What
else is left of quantize and dequantize is listed with its reason. With `keep_if_faster` codes stay only where `gate`
measures them to be faster than float32. `fail_on_fallback` makes it an error where the operator beside a conversion
should compute with codes and does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Edit, GraphEditor
from graphopt.errors import PassError
from graphopt.passes.qdq_fusion.codes import DEQUANTIZE, QUANTIZE, Constants
from graphopt.passes.qdq_fusion.dynamic import fuse_dynamic_product
from graphopt.passes.qdq_fusion.elements import (
    drop_guard,
    fold_constant,
    fuse_choice,
    fuse_function,
    fuse_matrices,
    fuse_pair,
    make_unsigned,
    move,
    quantize_early,
)
from graphopt.passes.qdq_fusion.gate import gated, take_out_all
from graphopt.passes.qdq_fusion.orders import fuse_extreme, fuse_position
from graphopt.passes.qdq_fusion.products import PRODUCTS, Refused, Weight, fuse_product
from graphopt.passes.qdq_fusion.sums import fuse_average_pool, fuse_sum
from graphopt.passes.qdq_fusion.survivors import Survivor, from_codes_to_codes, survivors
from graphopt.passes.qdq_fusion.transposed import fuse_transposed
from graphopt.program import Program


@dataclass
class _Fusing:
    """One run over one graph: what is shared by its rewrites, and why operators were left alone."""

    editor: GraphEditor
    name: str
    constants: Constants
    weights: dict[Any, Weight]
    reasons: dict[Node, str] = field(default_factory=dict)

    def sweep(self, rewrite: Callable[[Node], Any]) -> None:
        for node in self.editor.nodes():
            if node.op == "call_function":
                rewrite(node)

    def quantize_early(self, node: Node) -> None:
        if node.target is QUANTIZE:
            quantize_early(self.editor, node, f"{self.name}/early")

    def prepare(self, node: Node) -> None:
        if node.target is QUANTIZE and not fold_constant(self.editor, node, f"{self.name}/constant"):
            make_unsigned(self.editor, node, f"{self.name}/unsigned", self.constants)

    def fuse(self, node: Node) -> None:
        """In order of execution, so that what a node reads has been rewritten."""
        if node.target in PRODUCTS and self.tried(node, lambda: self._product(node)):
            return
        if self.tried(node, lambda: fuse_transposed(self.editor, node, f"{self.name}/product", self.constants)):
            return
        if fuse_matrices(self.editor, node, f"{self.name}/pair-of-codes", self.constants):
            return
        if drop_guard(self.editor, node, f"{self.name}/guard"):
            return
        if self.tried(node, lambda: fuse_position(self.editor, node, f"{self.name}/position", self.constants)):
            return
        if not move(self.editor, node, f"{self.name}/move", self.constants) and node.target is QUANTIZE:
            self._quantize(node)

    def _quantize(self, node: Node) -> None:
        """A quantize with what is before it."""
        fused = (
            fuse_function(self.editor, node, self.name)
            or fuse_choice(self.editor, node, f"{self.name}/choice")
            or fuse_extreme(self.editor, node, f"{self.name}/extreme")
            or fuse_sum(self.editor, node, f"{self.name}/sum", self.constants)
        )
        if fused:
            return
        source = node.args[0]
        assert isinstance(source, Node)
        if not self.tried(source, lambda: fuse_average_pool(self.editor, node, f"{self.name}/sum", self.constants)):
            reason = fuse_pair(self.editor, node, f"{self.name}/pair-of-codes", self.constants)
            if reason is not None:
                self.reasons[node] = reason

    def tried(self, node: Node, rewrite: Callable[[], bool]) -> bool:
        """What `rewrite` of `node` says; where it refuses, False with the reason kept."""
        try:
            return rewrite()
        except Refused as refused:
            self.reasons[node] = str(refused)
            return False

    def _product(self, node: Node) -> bool:
        if fuse_dynamic_product(self.editor, node, f"{self.name}/product", self.weights):
            return True
        return fuse_product(self.editor, node, f"{self.name}/product", self.constants, self.weights)


@dataclass(frozen=True)
class QDQFusion(Pass):
    """Compute with the 8-bit codes of a quantized program instead of the numbers that they stand for."""

    name = "qdq-fusion"
    preserves = "quantized"
    measured = False  # numbers that say what they round are no rival of codes: `gate` races regions against float32
    fail_on_fallback: bool = False

    def starts_at(self) -> frozenset[Any]:
        return frozenset({QUANTIZE, DEQUANTIZE, *PRODUCTS})

    def run(self, program: Program, context: PassContext) -> PassResult:
        gate = None if context.race is None else gated(program, _fused, context.race, context)
        edit = Edit(program, context, self.name)
        constants, weights = Constants(), dict[Any, Weight]()
        left: list[Survivor] = []
        whole: list[Node] = []
        for editor in edit.graphs():
            if gate is not None and not editor.path:
                take_out_all(editor, gate.floats, f"{self.name}/float32")
            fusing = _Fusing(editor, self.name, constants, weights)
            fusing.sweep(fusing.quantize_early)
            fusing.sweep(fusing.prepare)
            fusing.sweep(fusing.fuse)
            whole += from_codes_to_codes(editor)
            for survivor in survivors(editor, fusing.reasons):
                kind = "fallback" if survivor.fallback else "conversion"
                editor.decline(f"{self.name}/{kind}", survivor.node, survivor.reason)
                left.append(survivor)
        fallbacks = [survivor for survivor in left if survivor.fallback]
        if whole:
            edit.notes.append(_between(whole))
        edit.notes.append(_summary(left))
        if fallbacks and self.fail_on_fallback:
            first = fallbacks[0]
            raise PassError(
                f"{self.name}: {len(fallbacks)} conversions are left at operators that are computed in float32, the "
                f"first at {first.node.name}: {first.reason}"
            )
        if gate is None:
            return edit.finish()
        edit.notes.extend(gate.notes)
        return replace(edit.finish(), regions=gate.regions)


def _fused(program: Program) -> Program:
    return QDQFusion().run(program, PassContext()).program


def _between(whole: list[Node]) -> str:
    kinds = Counter(str(node.target).split(".")[1].strip("_") for node in whole)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"computed in float32 in one kernel each that reads codes and writes codes: {listed}"


def _summary(left: list[Survivor]) -> str:
    reasons = Counter(survivor.reason for survivor in left)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    count = sum(survivor.fallback for survivor in left)
    return f"{len(left)} conversions are left, {count} at a fallback{f': {listed}' if listed else ''}"
