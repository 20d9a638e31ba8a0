"""The float64 run, and errors against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from graphopt.checking.reference import largest_error, magnitude, run_float64
from tests.passes.checking import captured


@pytest.mark.parametrize(
    ("result", "reference", "error"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.5),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([-math.inf], [math.inf], math.inf),
        ([math.nan], [math.nan], 0.0),
        ([math.nan], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_error_counts_infinities_and_nan(result: list[float], reference: list[float], error: float) -> None:
    assert largest_error(torch.tensor(result), torch.tensor(reference, dtype=torch.float64)) == error


def test_magnitude_is_of_finite_values() -> None:
    assert magnitude(torch.tensor([1.0, -3.0, math.inf])) == 3.0
    assert magnitude(torch.tensor([math.nan])) == 0.0


def test_the_reference_run_is_float64_throughout() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.half().float() + torch.arange(3, dtype=torch.float32)) / 3

    x = torch.rand(3)
    (result,) = run_float64(captured(Steps(), x), (x,))
    assert torch.equal(result, (x.double() + torch.arange(3, dtype=torch.float64)) / 3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_branches_run_in_float64(sign: float) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x.sin(), (x,))

    module, x = Either(), torch.rand(2, 4) * sign
    (result,) = run_float64(captured(module, torch.rand(2, 4)), (x,))
    expected = nn.functional.linear(x.double(), module.layer.weight.double(), module.layer.bias.double())
    assert torch.equal(result, expected if sign > 0 else x.double().sin())
