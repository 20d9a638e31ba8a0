from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.errors import CaptureError


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


LAST_TWO: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[-2:],
    lambda x: x[-2:].sum(0),
    lambda x: x[:2] * 2,
    lambda x: x.squeeze(0),
]
ANY_SIZE: list[Callable[[Tensor], Tensor]] = [lambda x: x[-1:], lambda x: x.sum(0), lambda x: x[:1]]


@pytest.mark.parametrize("function", LAST_TWO)
def test_a_shape_that_holds_from_two_on_raises_the_bound(function: Callable[[Tensor], Tensor]) -> None:
    program = graphopt.capture(Function(function), (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    assert program.sizes["batch"].low == 2


@pytest.mark.parametrize("function", ANY_SIZE)
def test_other_sizes_may_be_one(function: Callable[[Tensor], Tensor]) -> None:
    program = graphopt.capture(Function(function), (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    assert program.sizes["batch"].low == 1
    assert program(torch.ones(1, 4))[0].shape == function(torch.ones(1, 4)).shape


def test_a_least_value_of_one_that_does_not_hold_is_refused() -> None:
    with pytest.raises(CaptureError, match="size 'batch' may be 1"):
        shapes = {"x": {0: Dim("batch", min=1, max=9)}}
        graphopt.capture(Function(LAST_TWO[0]), (torch.randn(3, 4),), dynamic_shapes=shapes)


def test_sizes_that_divide_by_zero_at_one_are_captured_and_checked_elsewhere() -> None:
    shapes = {"x": {0: "batch"}}
    program = graphopt.capture(
        Function(lambda x: x * (12 // (x.shape[0] - 1))), (torch.randn(3, 4),), dynamic_shapes=shapes
    )
    report = graphopt.optimize(program, "O1").report
    assert any("batch=1: PyTorch cannot run it" in sentence for sentence in report.not_checked)
