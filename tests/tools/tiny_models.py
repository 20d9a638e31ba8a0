"""Functions that MODEL may name on the command line."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dense(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right, self.norm = nn.Linear(8, 4), nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x).clone()
        return self.norm(self.left(y) + self.right(y))


def branching() -> tuple[nn.Module, tuple[Tensor]]:
    return Branching().eval(), (torch.randn(3, 8),)


def dense() -> tuple[nn.Module, tuple[Tensor]]:
    return Dense(1).eval(), (torch.randn(3, 8),)


def other_dense() -> tuple[nn.Module, tuple[Tensor]]:
    return Dense(2).eval(), (torch.randn(3, 8),)


def two_products() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval(), (torch.randn(3, 8),)


def wide() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(1024, 1024).eval(), (torch.randn(3, 1024),)


def no_example() -> nn.Module:
    return nn.Linear(8, 8)


def broken() -> None:
    raise RuntimeError("no such checkpoint")


def leaves() -> None:
    raise SystemExit(7)


class OwnFilter(nn.Module):
    """Convolution by a filter that is not constant."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, x)


def unscheduled() -> tuple[nn.Module, tuple[Tensor]]:
    return OwnFilter(), (torch.randn(2, 2, 8),)
