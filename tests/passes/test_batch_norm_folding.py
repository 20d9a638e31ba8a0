from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphopt.passes.batch_norm_folding import BatchNormFolding
from tests.passes.checking import captured, check_pass, targets


def settled(module: nn.Module) -> nn.Module:
    """Give every batch normalization statistics and weights that are not the identity."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, -2, 2)
                nn.init.normal_(part.bias)
    return module.eval()


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    (lambda: nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)), (2, 4, 5, 5)),
    (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, eps=1e-2)), (1, 2, 4, 4, 4)),
    (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 5)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    (lambda: nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4)), (1, 2, 3, 3, 3)),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_fires(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    result = check_pass(captured(settled(make()), torch.randn(shape)), BatchNormFolding(), rewrites=1)
    assert len(targets(result.program)) == 1
    assert len(result.program.graph_module.state_dict()) == 2


def test_a_linear_over_a_sequence_is_normalized_along_another_axis() -> None:
    module = settled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    check_pass(captured(module, torch.randn(3, 5, 4)), BatchNormFolding(), 0, "has 3 axes")


class Branching(nn.Module):
    """The convolution is read by the normalization and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y.relu()


def test_a_convolution_with_another_reader_stays() -> None:
    program = captured(settled(Branching()), torch.randn(1, 3, 6, 6))
    check_pass(program, BatchNormFolding(), 0, "conv2d is also used by relu")


class Shared(Branching):
    """One convolution, applied twice, normalized once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


def test_weights_used_elsewhere_stay_as_they_are() -> None:
    result = check_pass(captured(settled(Shared()), torch.randn(1, 3, 6, 6)), BatchNormFolding(), rewrites=1)
    assert {"conv.weight", "batch_norm_folding_0"} <= set(result.program.graph_module.state_dict())


class Given(nn.Module):
    """The weight of the convolution is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.conv2d(x, weight))


def test_a_weight_that_is_no_constant_stays() -> None:
    program = captured(settled(Given()), torch.randn(1, 3, 6, 6), torch.randn(4, 3, 1, 1))
    check_pass(program, BatchNormFolding(), 0, "the weight of conv2d is no constant")


def test_a_weight_that_would_not_be_finite_stays() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    module[1].running_var.fill_(-1)  # type: ignore[index]
    program = captured(module, torch.randn(1, 3, 2, 2))
    check_pass(program, BatchNormFolding(), 0, "not finite")


def test_statistics_of_the_batch_stay() -> None:
    class Live(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(self.conv(x), None, None, training=True)

    check_pass(captured(Live(), torch.randn(2, 3, 4, 4)), BatchNormFolding(), rewrites=0)
