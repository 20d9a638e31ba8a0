"""Conversions that are left after fusion: which, and why each is.

Some belong where they are: codes are made of the program's inputs and become its outputs, and operators that are
computed in float32 on purpose, such as an instance norm, stand between conversions. So do operators without a
weight of codes that read a number which the program never made a code of. A conversion at any other operator is a
fallback: a product that is computed in float32 although its operands are codes.

Softmax and norms over the last axis are left between conversions as well, but those are not left over: one kernel reads
codes, computes in float32 and writes codes. They are counted apart, and only where nothing else reads the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node

from graphopt.edit import GraphEditor
from graphopt.matcher import argument
from graphopt.passes.qdq_fusion.codes import BYTES, DEQUANTIZE, QUANTIZE, codes_of, into_of, only_user
from graphopt.passes.qdq_fusion.elements import MOVES, SPLITS, is_pointwise

aten = torch.ops.aten
_WITHIN = frozenset(
    {
        *(aten.softmax.int, aten._softmax.default, aten.layer_norm.default, aten.rms_norm.default),
        *(
            aten.group_norm.default,
            aten.instance_norm.default,
            aten.mean.dim,
            aten.sum.dim_IntList,
            aten.avg_pool2d.default,
        ),
        *(aten.adaptive_avg_pool2d.default, aten.scaled_dot_product_attention.default),
    }
)
_OVER_ROWS = {
    aten.softmax.int: "dim",
    aten._softmax.default: "dim",
    aten.log_softmax.int: "dim",
    aten._log_softmax.default: "dim",
    aten.layer_norm.default: "normalized_shape",
    aten.rms_norm.default: "normalized_shape",
}


@dataclass(frozen=True)
class Survivor:
    """A conversion, the reason it is left, and whether the operator beside it should not be computed in float32."""

    node: Node
    reason: str
    fallback: bool


def survivors(editor: GraphEditor, reasons: Mapping[Node, str]) -> list[Survivor]:
    """Every conversion of computed values; `reasons` says why an operator was left alone."""
    found = []
    whole = set(from_codes_to_codes(editor))
    for node in editor.graph.nodes:
        if node.target is QUANTIZE and node.args[0] not in whole:
            found.append(_of(node, _origin(node.args[0]), reasons))
        elif node.target is DEQUANTIZE and editor.constant_value(node.args[0]) is None:
            found += [_of(node, user, reasons) for user in node.users if user not in whole]
    return found


def from_codes_to_codes(editor: GraphEditor) -> list[Node]:
    """Softmaxes and norms over the last axis: the operand is dequantized for such alone, the result quantized."""
    return [
        node
        for node in editor.graph.nodes
        if _is_over_rows(node)
        and codes_of(editor, node.args[0]) is not None
        and all(_is_over_rows(user) and user.args[0] is node.args[0] for user in node.args[0].users)
        and only_user(node, lambda user: into_of(editor, user) is not None) is not None
    ]


def _is_over_rows(node: Node) -> bool:
    if node.target not in _OVER_ROWS:
        return False
    over, last = argument(node, _OVER_ROWS[node.target]), node.meta["val"].dim() - 1
    return over in (-1, last) if isinstance(over, int) else len(over) == 1


def _origin(source: Node) -> Node:
    """What made a value, before it was moved."""
    while source.target in (*MOVES, *SPLITS, operator.getitem, aten._to_copy.default):
        source = source.args[0]  # type: ignore[assignment]
    return source


def _reads_codes_alone(node: Node) -> bool:
    """Whether all that an operator computes with stands for codes, but for constants, or its weight does: it could
    use the codes."""
    origins = [_origin(source) for source in node.all_input_nodes]
    if any(source.target is DEQUANTIZE and not _is_computed(source) for source in origins):
        return True
    computed = [source for source in origins if source.target is not DEQUANTIZE and _is_computed(source)]
    return len(computed) < len(origins) and not any(_is_number(source) for source in computed)


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_computed(node: Node) -> bool:
    """From the program's inputs."""
    seen, pending = {node}, [node]
    while pending:
        each = pending.pop()
        if each.op == "placeholder":
            return True
        pending += [source for source in each.all_input_nodes if source not in seen]
        seen.update(pending)
    return False


def _of(node: Node, beside: Node, reasons: Mapping[Node, str]) -> Survivor:
    if beside.op in ("placeholder", "output"):
        return Survivor(node, f"the program's {'input' if beside.op == 'placeholder' else 'output'} is numbers", False)
    name = str(beside.target).removesuffix(".default") if beside.op == "call_function" else beside.name
    codes_alone = _reads_codes_alone(beside)
    codes = node if node.target is QUANTIZE else node.args[0]
    if codes_alone and codes.meta["val"].dtype not in BYTES:  # type: ignore[union-attr]
        kind = str(codes.meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        return Survivor(node, f"{name} has codes of {kind}: integer kernels take 8 bits", True)
    if (reason := reasons.get(node) or reasons.get(beside)) is not None:
        return Survivor(node, f"{name}: {reason}", codes_alone)
    if not codes_alone:
        return Survivor(node, f"{name} reads numbers that were never codes", False)
    if beside.target in (QUANTIZE, DEQUANTIZE):
        return Survivor(node, "the conversion beside it has other parameters", True)
    integer = isinstance(beside.target, OpOverload) and beside.target.namespace == "graphopt"
    if integer or is_pointwise(beside) or beside.target in _WITHIN:
        return Survivor(node, f"{name} is computed in float32", False)
    return Survivor(node, f"{name} has no form on codes", True)
