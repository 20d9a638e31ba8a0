"""Which blocks a network needs least, from samples.

- block-influence: 1 - cos(x before, x after) of a block, averaged over tokens and samples (Men et al. 2024, "ShortGPT",
  arXiv 2403.03853).
- angular: arccos(cos(x before, x after)) / pi of a whole run of blocks at the last token; the run with the least goes
  (Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887).
- loss-drop: the metric without the block; blocks go one after another, each time the one that is missed least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from graphopt.checking.samples import CANNOT_RUN
from graphopt.data.dataset import Sample
from graphopt.errors import VerificationError
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program

Scores = dict[int, float]


def boundary_values(program: Program, names: Sequence[str], samples: Iterable[Sample]) -> Iterator[list[torch.Tensor]]:
    """The values of these nodes of the main graph for every sample, each run from the initial state."""
    values: dict[str, Any] = dict.fromkeys(names)

    def see(name: str, value: Any) -> None:
        if name in values:
            values[name] = value

    for index, sample in enumerate(samples):
        try:
            with torch.no_grad():
                inputs = (*sample.inputs, *(item.initial for item in program.state))
                ProgramInterpreter(program.graph_module, see=see).run(*inputs)
        except CANNOT_RUN as e:
            raise VerificationError(f"{program.name} cannot run sample {index} of the data: {e}") from e
        yield [values[name] for name in names]


def block_influence(values: Iterable[Sequence[torch.Tensor]]) -> Scores:
    """For every block 1 - the mean cosine of its input and output along the last axis, in float64."""
    return _mean([1 - float(_cosine(a, b).mean()) for a, b in pairwise(boundaries)] for boundaries in values)


def angular_distances(values: Iterable[Sequence[torch.Tensor]], length: int) -> Scores:
    """For every first block of a run of `length`: the mean angle, over pi, between its input and the run's output.

    At the last token where there is an axis of tokens: the last axis but one.
    """

    def angles(boundaries: Sequence[torch.Tensor]) -> list[float]:
        last = [value[..., -1, :] if value.dim() > 2 else value for value in boundaries]
        pairs = zip(last, last[length:], strict=False)
        return [float(_cosine(a, b).clamp(-1, 1).acos().mean()) / math.pi for a, b in pairs]

    return _mean(map(angles, values))


def _mean(samples: Iterable[list[float]]) -> Scores:
    """The mean over samples at each position."""
    rows = list(samples)
    return {position: math.fsum(column) / len(rows) for position, column in enumerate(zip(*rows, strict=True))}


def _cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)


def in_order_of_loss(
    foldable: Sequence[int], count: int, score: Callable[[tuple[int, ...]], float]
) -> tuple[list[int], Scores]:
    """The blocks in the order in which they are missed least, and the score without each of them first.

    `score(positions)` is the metric, more is better, without these blocks.
    """
    order: list[int] = []
    alone: Scores = {}
    while len(order) < count:
        scores = {position: score((*order, position)) for position in foldable if position not in order}
        alone = alone or scores
        order.append(max(scores, key=lambda position: scores[position]))
    return order, alone
