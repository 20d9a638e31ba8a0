"""Products that leave out blocks of channels, compiled, against their specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt.operators  # noqa: F401

graphopt_ops = torch.ops.graphopt


class Convolution(nn.Module):
    """The masks are inputs of the model: bool tensors, None where there is none."""

    def __init__(self, inputs: int, outputs: int, taps: int, **options: Any) -> None:
        super().__init__()
        depthwise = options.get("groups", 1) > 1
        self.weight = nn.Parameter(torch.randn(outputs, 1 if depthwise else inputs, taps, taps) / taps)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **options}

    def forward(self, x: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        return graphopt_ops.gated_convolution(x, self.weight, self.bias, inputs, outputs, **self.options).relu()


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        result = graphopt_ops.gated_linear(x, self.linear.weight, self.linear.bias, inputs, outputs)
        return nn.functional.gelu(result)


PADDED = {"padding": [1, 1]}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "minimal filtering": (lambda: Convolution(64, 96, 3, **PADDED), (64, 9, 10), 4, 6),
    "minimal filtering of uneven outputs": (lambda: Convolution(64, 40, 3, **PADDED), (64, 8, 8), 4, 0),
    "strided and dilated": (
        lambda: Convolution(32, 48, 3, stride=[2, 2], dilation=[2, 1], **PADDED),
        (32, 11, 9),
        2,
        3,
    ),
    "in parts": (lambda: Convolution(512, 48, 3, **PADDED), (512, 5, 5), 32, 3),
    "few channels": (lambda: Convolution(3, 32, 3, **PADDED), (3, 7, 7), 0, 2),
    "depthwise": (lambda: Convolution(48, 48, 3, groups=48, **PADDED), (48, 7, 9), 0, 3),
    "rows": (lambda: Linear(64, 96), (7, 64), 4, 6),
    "vectors with uneven outputs": (lambda: Linear(64, 10), (64,), 4, 0),
}


class All(nn.Module):
    """Every case at once, on parts of one row of numbers a sample; each has its own columns of the masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(make() for make, *_ in CASES.values())

    def forward(self, x: Tensor, masks: Tensor) -> dict[str, Tensor]:
        found, at = {}, 0
        for (name, (_, shape, inputs, outputs)), part in zip(CASES.items(), self.parts, strict=True):
            taking = masks[:, at : at + inputs] if inputs else None
            making = masks[:, at + inputs : at + inputs + outputs] if outputs else None
            found[name] = part(x[:, : math.prod(shape)].unflatten(1, shape), taking, making)
            at += inputs + outputs
        return found


COLUMNS = sum(inputs + outputs for _, _, inputs, outputs in CASES.values())


def feed(samples: int, share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    numbers = torch.randn(samples, max(math.prod(shape) for _, shape, *_ in CASES.values()), generator=generator)
    return numbers, torch.rand(samples, COLUMNS, generator=generator) < share


def test_every_form_agrees_with_the_specification(agree: Any) -> None:
    """All blocks, some, another number for each sample, and none, with one sample and with several."""
    first, *more = [feed(samples, share) for samples in (3, 1) for share in (0.5, 0.2, 1.0, 0.0)]
    run = agree(All(), first, [{0: "batch"}, {0: "batch"}], more, rtol=1e-4, atol=1e-4)
    rules = set(run.artifact.report["kernels"].values())
    assert {"gated-winograd", "gated-direct-convolution", "gated-depthwise"} <= rules
