"""A policy with its thresholds: nodes that decide at each exit, and the same on recorded logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder
from graphopt.passes.early_exit.policies import CONFIDENCES

aten = torch.ops.aten


@dataclass(frozen=True)
class Policy:
    """How sure an exit is of its answer, and from where on it is taken."""

    name: str
    thresholds: tuple[float, ...] = ()

    def decide(self, builder: Builder, logits: Node, number: int) -> tuple[Node, Node]:
        """The confidence and whether exit `number` is taken, both [samples]; logits [samples, (steps,) classes]."""
        confidence = self._confidence(builder.proxy_of(logits), logits.meta["val"]).node
        return confidence, builder.call(aten.ge.Scalar, confidence, self.thresholds[number])

    def confidences(self, logits: Sequence[Tensor]) -> Tensor:
        """[samples, exits] of the logits of each exit."""
        return torch.stack([self._confidence(item, item) for item in logits], 1)

    def _confidence(self, logits: Any, value: Tensor) -> Any:
        return CONFIDENCES[self.name](last_step(logits, value.dim()), int(value.shape[-1]))


def last_step(values: Any, rank: int) -> Any:
    """[samples, classes] of [samples, (steps,) classes]: where there are steps, the last one decides."""
    return aten.select.int(values, 1, -1) if rank == 3 else values
