"""What values take at the nodes of a program over a data set: one pass, and no value is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from graphopt.checking.samples import CANNOT_RUN
from graphopt.data.accumulators import Accumulator, Moments, Statistics
from graphopt.data.dataset import Sample
from graphopt.errors import UnknownNameError, UsageError, VerificationError
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program, full_name


def collect(
    program: Program, nodes: Iterable[str], samples: Iterable[Sample], axis: int | None = None
) -> dict[str, Statistics | None]:
    """Statistics of the values of `nodes` over `samples`: of the whole tensor, or for each channel along `axis`.

    A node of a branch is called by its path, "true_graph_0.linear". A node that no sample reached, or whose values
    were all empty, gets None. Raises what `observe` raises.
    """
    moments = {name: Moments(axis) for name in nodes}
    observe(program, {name: [item] for name, item in moments.items()}, samples)
    return {name: item.result() for name, item in moments.items()}


def observe(
    program: Program, accumulators: Mapping[str, Sequence[Accumulator]], samples: Iterable[Sample]
) -> dict[str, int]:
    """Run every sample from the initial state, and show each named node's value to its accumulators as it appears.

    Returns how many values each node gave: 0 where no sample reached it. Nothing here keeps a value, so memory does
    not grow with the number of samples. Raises UnknownNameError for a node that does not exist, UsageError for one
    whose value is no tensor, VerificationError where PyTorch cannot run a sample.
    """
    known = {
        full_name(path, node.name)
        for path, module in program.graphs()
        for node in module.graph.nodes
        if node.op != "output"
    }
    for name in accumulators:
        if name not in known:
            raise UnknownNameError("node", name, known)
    watch = _Watch(accumulators)
    for index, sample in enumerate(samples):
        program.bind(sample.inputs)
        try:
            with torch.no_grad():
                interpreter = ProgramInterpreter(program.graph_module, see=watch.show)
                interpreter.run(*sample.inputs, *(item.initial for item in program.state))
        except CANNOT_RUN as e:
            raise VerificationError(f"{program.name} cannot run sample {index} of the data: {e}") from e
    return watch.seen


class _Watch:
    """Hands values to accumulators, and counts them."""

    def __init__(self, accumulators: Mapping[str, Sequence[Accumulator]]) -> None:
        self.accumulators = accumulators
        self.seen = dict.fromkeys(accumulators, 0)

    def show(self, name: str, value: Any) -> None:
        if name not in self.seen:
            return
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"node {name!r} gives {type(value).__name__}, not one tensor; name a node that reads it")
        self.seen[name] += 1
        for accumulator in self.accumulators[name]:
            try:
                accumulator.update(value)
            except (UsageError, *CANNOT_RUN) as e:
                raise UsageError(f"statistics of node {name!r}: {e}") from e
