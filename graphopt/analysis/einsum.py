"""What the letters of an einsum over two tensors say of its axes."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Einsum:
    """The operands with one letter an axis each, and the letters of the result; `...` has become letters of its own."""

    operands: tuple[tuple[Node, str], tuple[Node, str]]
    result: str

    def split(self, letter: str) -> tuple[tuple[Node, str], tuple[Node, str]] | None:
        """The operands, first the one without `letter`; None where both have it, or neither."""
        left, right = self.operands
        if (letter in left[1]) == (letter in right[1]):
            return None
        return (right, left) if letter in left[1] else (left, right)


def read_einsum(node: Node) -> Einsum | None:
    """The einsum that `node` is; None for anything else, more or fewer tensors, and a letter twice in one operand."""
    if node.target is not aten.einsum.default:
        return None
    equation, tensors = node.args[:2]
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    first, second = tensors
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or not isinstance(first, Node) or not isinstance(second, Node):
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    ranks = [tensor.meta["val"].dim() for tensor in (first, second)]
    extra = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
    leading = ["".join(reversed(free[:count])) for count in (*extra, max(extra))]  # aligned at their last axis
    left, right, result = (
        term.replace("...", letters) for term, letters in zip((*terms, result), leading, strict=True)
    )
    named = (first, left), (second, right)
    if any(len(set(letters)) < len(letters) for _, letters in named):
        return None
    return Einsum(named, result)
