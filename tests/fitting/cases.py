"""Programs to train and data to train them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt import FitResult, Program
from graphopt.program import get_attribute, set_attribute

Feeds = list[Any]


def tensors(source: Program) -> dict[str, Tensor]:
    module = source.graph_module
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def perturbed(source: Program, name: str, scale: float = 0.5) -> Program:
    """A copy with noise on one weight."""
    result = source.copy()
    weight = get_attribute(result.graph_module, name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * scale * weight.std()
    set_attribute(result.graph_module, name, nn.Parameter(weight.detach() + noise, requires_grad=False))
    return result


def feeds(count: int, rows: int = 4, width: int = 16) -> Feeds:
    return [{"x": torch.randn(rows, width)} for _ in range(count)]


def same(a: FitResult, b: FitResult) -> bool:
    """Equal bits, and the same history."""
    left, right = tensors(a.program), tensors(b.program)
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return equal and (a.history, a.best_step, a.stopped_by) == (b.history, b.best_step, b.stopped_by)


def square(outputs: tuple[Tensor, ...], label: Tensor | None) -> Tensor:
    return outputs[0].square().mean()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor([0.4, -0.4, 0.3, -0.3]))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate > 0).to(x.dtype) + (x * self.scale).round()
