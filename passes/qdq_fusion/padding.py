"""Padding of codes: dequantize(pad(x, code)) = pad(dequantize(x), number) where the number has a code.

Where only quantizes with the parameters of x read what is padded, the code that they make of any number does. A
convolution's own padding stands for 0, so that it takes in what is padded before it with the zero point, unequal sides
too; padding with elements of x is a move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import GraphEditor
from graphopt.matcher import argument
from graphopt.passes.qdq_fusion.codes import Codes, into_of

aten = torch.ops.aten
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})


def is_constant_padding(node: Any) -> bool:
    """Whether the node pads with a number."""
    if not isinstance(node, Node) or node.target not in _PADS:
        return False
    return node.target is aten.constant_pad_nd.default or argument(node, "mode") == "constant"


def padding_code(editor: GraphEditor, node: Node, codes: Codes) -> int | None:
    """The code that stands for what `node` pads dequantized `codes` with; None where none does."""
    value = torch.tensor(float(argument(node, "value") or 0))
    low, high = codes.bounds
    code = int((torch.round(value / codes.scale) + codes.zero).clamp(low, high))
    if float((code - codes.zero) * codes.scale) == float(value):
        return code
    readers = [into_of(editor, user) for user in node.users]
    if not readers or any(into is None or not into.equals(codes) for into in readers):
        return None
    made = {int(into.of(value)) for into in readers if into is not None}
    return made.pop() if len(made) == 1 else None


def unpadded(codes: Codes, reach: list[int]) -> tuple[Codes, list[int]]:
    """Images before a padding that stands for 0, and what it adds: above, left, below, right; else `codes` and zeros.

    `reach` is how far the taps of a convolution's window lie apart, along both axes.
    """
    node, nothing = codes.node, [0, 0, 0, 0]
    if not is_constant_padding(node) or argument(node, "value") != codes.zero:
        return codes, nothing
    sides = [int(side) for side in argument(node, "pad")]
    left, right, above, below, *others = [*sides, *nothing[len(sides) :]]
    if any(others) or min(left, right, above, below) < 0:
        return codes, nothing
    if max(above, below) >= reach[0] or max(left, right) >= reach[1]:
        return codes, nothing
    return Codes(node.args[0], codes.scale, codes.zero), [above, left, below, right]  # type: ignore[arg-type]
