"""Gates that a graph has: a sigmoid, its axes rearranged and perhaps with a factor, times what is attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

REARRANGING = frozenset(
    {
        *(aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default, aten.view.default),
        *(aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.squeeze.dim),
    }
)
_SPREADING = frozenset({aten.unsqueeze.default, aten.unflatten.int, aten.expand.default})


@dataclass(frozen=True)
class Gate:
    """`product` is the gated value, `sigmoid` [rows, heads or heads x width] times `factor` the gate."""

    product: Node
    sigmoid: Node
    factor: float

    @property
    def scores(self) -> Node:
        """What the sigmoid is taken of."""
        found = self.sigmoid.args[0]
        assert isinstance(found, Node)
        return found


def find_gate(output: Node) -> Gate | None:
    """The gate behind an attention's output, before or after its heads are put together."""
    pending = [output]
    while pending:
        for user in pending.pop().users:
            if user.target is aten.mul.Tensor:
                for operand in user.args:
                    if isinstance(operand, Node) and (found := _sigmoid_below(operand)) is not None:
                        return Gate(user, *found)
            elif user.target in REARRANGING:
                pending.append(user)
    return None


def _sigmoid_below(node: Node) -> tuple[Node, float] | None:
    factor = 1.0
    current: Any = node
    while isinstance(current, Node) and current.op == "call_function":
        if current.target is aten.sigmoid.default:
            return current, factor
        if current.target is aten.mul.Tensor and isinstance(current.args[1], (int, float)):
            factor *= current.args[1]
        elif current.target not in REARRANGING | _SPREADING:
            return None
        current = current.args[0]
    return None
