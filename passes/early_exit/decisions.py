"""A policy with its thresholds: nodes that decide at each exit, and the same on recorded logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder
from graphopt.passes.early_exit.policies import CONFIDENCES, TINY, features

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A learned gate: sigmoid(weight [1, 4] features + bias [1])."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter


@dataclass(frozen=True)
class Policy:
    """How sure an exit is of its answer, and from where on it is taken; `gates` are those of the policy "gate"."""

    name: str
    thresholds: tuple[float, ...] = ()
    gates: tuple[Gate, ...] = ()

    def decide(self, builder: Builder, logits: Node, number: int, memory: Memory) -> tuple[Node, Node]:
        """The confidence and whether exit `number` is taken, both [samples]; logits [samples, (steps,) classes].

        `memory` is handed from exit to exit.
        """
        if memory.kept is not None:
            memory.kept = builder.proxy_of(memory.kept.node)
        found = self._confidence(builder.proxy_of(logits), logits.meta["val"], number, memory)
        return found.node, builder.call(aten.ge.Scalar, found.node, self.thresholds[number])

    def confidences(self, logits: Sequence[Tensor]) -> Tensor:
        """[samples, exits] of the logits of each exit."""
        memory = Memory()
        with torch.no_grad():
            return torch.stack([self._confidence(x, x, number, memory) for number, x in enumerate(logits)], 1)

    def _confidence(self, logits: Any, value: Tensor, number: int, memory: Memory) -> Any:
        if self.name == "cosine":
            return memory.stillness(logits)
        last = last_step(logits, value.dim())
        if self.name != "gate":
            return CONFIDENCES[self.name](last, int(value.shape[-1]))
        gate = self.gates[number]
        return memory.conditional(opened(features(last), gate.weight, gate.bias))


class Memory:
    """What is handed from exit to exit: what gates have spent of every sample, or the last embedding."""

    def __init__(self) -> None:
        self.kept: Any = None

    def stillness(self, embedding: Any) -> Any:
        """The cosine [samples] of this embedding [samples, width] and the one before it; 0 at the first exit."""
        before, self.kept = self.kept, embedding
        if before is None:
            return aten.mul.Tensor(aten.select.int(embedding, -1, 0), 0.0)
        squares = aten.mul.Tensor(_along(embedding, embedding), _along(before, before))
        cosine = aten.div.Tensor(_along(embedding, before), aten.sqrt.default(aten.clamp_min.default(squares, TINY)))
        return aten.clamp.default(cosine, 0, 1)

    def conditional(self, gate: Any) -> Any:
        """The probability of this exit for a sample that has come to it (JEI-DNN, equation 4).

        Exit l is taken with probability P(l) = max(0, min(g(l), 1 - g(1) - ... - g(l - 1))), which leaves
        1 - min(1, g(1) + ... + g(l)) for what comes after it.
        """
        if self.kept is None:
            self.kept = gate
            return gate
        left = aten.clamp_min.default(aten.rsub.Scalar(self.kept, 1), TINY)
        self.kept = aten.add.Tensor(self.kept, gate)
        return aten.clamp.default(aten.div.Tensor(aten.minimum.default(gate, left), left), 0, 1)


def _along(left: Any, right: Any) -> Any:
    return aten.sum.dim_IntList(aten.mul.Tensor(left, right), [-1])


def opened(values: Any, weight: Any, bias: Any) -> Any:
    """[samples], from 0 to 1, of features [samples, 4]."""
    return aten.sigmoid.default(aten.squeeze.dim(aten.linear.default(values, weight, bias), -1))


def last_step(values: Any, rank: int) -> Any:
    """[samples, classes] of [samples, (steps,) classes]: where there are steps, the last one decides."""
    return aten.select.int(values, 1, -1) if rank == 3 else values
