"""Which calls do more than compute a value from their arguments: random numbers, writing into memory."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Node

from graphopt.matcher import argument

_RECURRENT = ("rnn", "lstm", "gru")  # tagged as random for a dropout that eval mode turns off


def draws_random(node: Node) -> bool:
    """Whether running the node twice gives different values; dropout that is off does not."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    name = target._schema.name
    if "scaled_dot_product" in name:
        return float(argument(node, "dropout_p")) > 0
    if name in ("aten::dropout", "aten::native_dropout", "aten::dropout_", "aten::alpha_dropout"):
        return bool(argument(node, "train")) and float(argument(node, "p")) > 0
    if name in ("aten::rrelu", "aten::rrelu_with_noise"):
        return bool(argument(node, "training"))
    return not any(kind in name for kind in _RECURRENT)


def has_effect(node: Node) -> bool:
    """Whether the node may not go though nothing reads it."""
    if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return draws_random(node) or node.target._schema.is_mutable
    return bool(node.is_impure())
