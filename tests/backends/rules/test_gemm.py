"""The packed GEMM over awkward sizes: one row, primes, tails in every dimension, epilogues of every kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.backends.rules.gemm import pack_weight

ROWS = (1, 2, 7, 8, 9, 63, 64, 65, 131)
SHAPES = [(1, 1), (3, 15), (4, 16), (5, 17), (33, 47), (384, 48), (8, 49), (13, 96), (130, 97)]


class Linears(nn.Module):
    """Linears of every shape on their part of the columns of x."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=n % 2 == 1) for k, n in SHAPES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{k}x{n}": linear(x[:, :k]) for (k, n), linear in zip(SHAPES, self.linears, strict=True)}


def test_every_tail(agree: Callable[..., None]) -> None:
    more = [(torch.randn(rows, 384),) for rows in ROWS]
    agree(Linears(), (torch.randn(5, 384),), [{0: "rows"}], more)


class Epilogues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.up(x)
        tanh_gelu = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h.pow(3))))
        branch = self.down(tanh_gelu.view(-1, 50)).view(x.shape) + x
        return {"branch": branch, "both": torch.relu(self.up(branch)), "scaled": self.down(h) * scale, "h": h}


def test_epilogues_with_residuals_reuse_and_reshapes(agree: Callable[..., None]) -> None:
    more = [(torch.randn(b, s, 24), torch.randn(24)) for b, s in [(1, 1), (3, 5), (2, 64)]]
    agree(Epilogues(), (torch.randn(2, 3, 24), torch.randn(24)), [{0: "b", 1: "s"}, None], more)


def test_static_rows(agree: Callable[..., None]) -> None:
    agree(Linears(), (torch.randn(67, 384),))


@pytest.mark.parametrize(("n", "k", "columns"), [(5, 3, 4), (8, 2, 4), (1, 1, 48)])
def test_packing_is_a_transpose_in_panels(n: int, k: int, columns: int) -> None:
    weight = np.arange(n * k, dtype=np.float32).reshape(n, k)
    packed = pack_weight(weight, columns)
    assert packed.shape == (-(-n // columns), k, columns)
    flat = packed.transpose(0, 2, 1).reshape(-1, k)
    assert np.array_equal(flat[:n], weight) and not flat[n:].any()
