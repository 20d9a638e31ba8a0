"""What numbers close to a half may change: other code for the same program rounds some of them to the other side.

A sum in another order, or a polynomial for an activation, differs by a few units of float32's precision; behind a
quantizer that is nothing or a whole step. So the program runs again with every quantizer's scale a little larger, and a
little smaller: what flips then includes what may flip in other code, and shows what a flip is worth at each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program

_SHIFT = 2.0**-14  # of a scale: errors of activations, 3e-6 absolute, lie within it from a twentieth on


def shifted_runs(program: Program, inputs: Sequence[Any]) -> list[tuple[torch.Tensor, ...]]:
    """The outputs with scales larger and smaller; nothing where the program rounds to no codes.

    `inputs` are those of the program, then its state.
    """
    if not any(_rounds(node) for _, module in program.graphs() for node in module.graph.nodes):
        return []
    with torch.no_grad():
        runs = [kind(program.graph_module).run(*inputs) for kind in (_Larger, _Smaller)]
    return [tuple(run)[: len(program.outputs)] for run in runs]


def _rounds(node: Node) -> bool:
    """Whether it is an operator of ours from numbers or sums to codes."""
    schema = getattr(node.target, "_schema", None)
    value = node.meta.get("val")
    if schema is None or not schema.name.startswith("graphopt::") or not isinstance(value, torch.Tensor):
        return False
    return not value.is_floating_point() and any(argument.name == "scale" for argument in schema.arguments)


class _Larger(ProgramInterpreter):
    factor = 1 + _SHIFT

    def compute(self, node: Node) -> Any:
        if not _rounds(node):
            return super().compute(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = [value * self.factor if name == "scale" else value for name, value in zip(names, args, strict=False)]
        return node.target(*given, **kwargs)  # type: ignore[operator]


class _Smaller(_Larger):
    factor = 1 - _SHIFT
