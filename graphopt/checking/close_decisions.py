"""Samples whose exit is too close to call: rounding alone may send them another way in other code."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program, full_name

MARGIN = 1e-4  # of a confidence from the threshold that it is compared with


def close_samples(program: Program, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """bool [samples]: whether any decision on the way of a sample is within MARGIN of its threshold.

    `program` has exits, and so no state.
    """
    assert program.exits is not None
    thresholds: dict[str, float] = {}
    for path, module in program.graphs():
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.ge.Scalar):
            thresholds[full_name(path, node.args[0].name)] = node.args[1]
    margins: list[torch.Tensor] = []

    def see(name: str, value: Any) -> None:
        if name in thresholds:
            margins.append((value.double() - thresholds[name]).abs())

    with torch.no_grad():
        results = ProgramInterpreter(program.graph_module, see=see).run(*inputs)
    close: torch.Tensor = torch.zeros(len(results[program.exits.answers]), dtype=torch.bool)
    for margin in margins:
        if margin.shape == close.shape:
            close |= margin < MARGIN
    return close
