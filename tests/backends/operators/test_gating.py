"""Products that leave out blocks of channels, compiled, against their specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt.operators  # noqa: F401

graphopt_ops = torch.ops.graphopt


class Convolution(nn.Module):
    """The masks are inputs of the model: bool tensors."""

    def __init__(self, inputs: int, outputs: int, taps: int, **options: Any) -> None:
        super().__init__()
        self.depthwise = options.get("groups", 1) > 1
        self.weight = nn.Parameter(torch.randn(outputs, 1 if self.depthwise else inputs, taps, taps) / taps)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **options}

    def forward(self, x: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        taking = None if self.depthwise else inputs
        result = graphopt_ops.gated_convolution(x, self.weight, self.bias, taking, outputs, **self.options)
        return torch.relu(result)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        result = graphopt_ops.gated_linear(x, self.linear.weight, self.linear.bias, inputs, outputs)
        return nn.functional.gelu(result)


def masks(samples: int, blocks: int, kind: str) -> Tensor:
    if kind in ("all", "none"):
        return torch.full((samples, blocks), kind == "all")
    return torch.rand(samples, blocks, generator=torch.Generator().manual_seed(samples)) < 0.5


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, int, int]]] = {
    "minimal filtering": lambda: (Convolution(64, 96, 3, padding=[1, 1]), torch.randn(3, 64, 9, 10), 4, 6),
    "strided": lambda: (Convolution(32, 48, 3, padding=[1, 1], stride=[2, 2]), torch.randn(2, 32, 11, 9), 2, 3),
    "deep": lambda: (Convolution(512, 64, 3, padding=[1, 1]), torch.randn(1, 512, 5, 5), 32, 4),
    "one tap": lambda: (Convolution(64, 80, 1), torch.randn(2, 64, 5, 6), 4, 5),
    "dilated": lambda: (Convolution(32, 32, 3, dilation=[2, 2], padding=[1, 1]), torch.randn(1, 32, 8, 8), 2, 2),
    "depthwise": lambda: (Convolution(48, 48, 3, padding=[1, 1], groups=48), torch.randn(2, 48, 7, 9), 3, 3),
    "rows": lambda: (Linear(64, 96), torch.randn(2, 7, 64), 4, 6),
    "vectors": lambda: (Linear(64, 96), torch.randn(3, 64), 4, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_specification(agree: Any, name: str) -> None:
    module, x, inputs, outputs = CASES[name]()
    kinds = [(a, b) for a in ("all", "some", "none") for b in ("all", "some", "none")]
    first, *more = [(x, masks(len(x), inputs, a), masks(len(x), outputs, b)) for a, b in kinds]
    agree(module, first, None, more, rtol=1e-4, atol=1e-4)
