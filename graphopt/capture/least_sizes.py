"""Sizes of 1: torch.export takes every dynamic size for at least 2 and notes nowhere where a shape depends on it.

x[-2:] over an axis of 3 or more has 2 rows, and so the exported graph says for any size; over an axis of 1 it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree

from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.errors import CaptureError
from graphopt.program import Program

_ASSUMED = 2  # what torch.export takes for the least value of a size


def raise_least_sizes(program: Program, asked: Mapping[str, int | None]) -> Program:
    """The program with a bound of 2 for each size at which 1 gives other shapes than its graph says.

    `asked` are the least values that the caller insists on. Raises CaptureError where they, or the examples, are below.
    """
    sizes = dict(program.sizes)
    for name, bounds in program.sizes.items():
        if bounds.low < _ASSUMED and (node := _other_shape(program, name)) is not None:
            if asked.get(name) is not None or program.bind(program.examples)[name] < _ASSUMED:
                raise CaptureError(
                    f"size {name!r} may be 1, but there {node.name} has another shape than torch.export says for all "
                    f"sizes; make that code work for any size, or give {name!r} a least value of {_ASSUMED}"
                )
            sizes[name] = replace(bounds, low=_ASSUMED)
    return replace(program, sizes=sizes)


def _other_shape(program: Program, name: str) -> Node | None:
    """The first node whose shape at size 1 is not what its metadata says; None too where PyTorch cannot run there."""
    if len(program.examples) != len(program.inputs):
        return None
    sizes = {**check_sizes(program)[0], name: 1}
    checker = _Checker(program, {symbol: sizes[of] for symbol, of in program.symbols.items()})
    try:
        with torch.no_grad():
            checker.run(*draw_inputs(program, sizes, seed=0), *(item.initial for item in program.state))
    except (RuntimeError, IndexError, ArithmeticError):
        pass
    return checker.found


class _Checker(Interpreter):
    """Runs the main graph and compares the shape of every value with the metadata's at the given sizes."""

    def __init__(self, program: Program, values: Mapping[str, int]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.values = values
        self.found: Node | None = None

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and self.found is None:
            real, noted = _pytree.tree_leaves(result), _pytree.tree_leaves(n.meta.get("val"))
            pairs = [(a, b) for a, b in zip(real, noted, strict=False) if isinstance(a, torch.Tensor)]
            if any(not self._fits(tensor.shape, fake.shape) for tensor, fake in pairs):
                self.found = n
        return result

    def _fits(self, real: torch.Size, noted: torch.Size) -> bool:
        return len(real) == len(noted) and all(
            size == self._value(other) for size, other in zip(real, noted, strict=True)
        )

    def _value(self, size: Any) -> Any:
        """A noted size as a number; where a name in it is unknown, it stays an expression and equals nothing."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        known = {symbol: self.values.get(symbol.name, symbol) for symbol in expression.free_symbols}
        return expression.subs(known)
