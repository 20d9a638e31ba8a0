"""The packed GEMM over awkward sizes: one row, primes, tails in every dimension, epilogues of every kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.backends.rules.gemm import configure, pack_weight
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.compile import compile as compile_program

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


class Repeated(nn.Module):
    """Rows that are a multiple of the size, each read from a row that is a remainder by it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(17, 1), nn.Linear(17, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        repeated = x.expand(2, -1, -1)
        tail = torch.cat([x, x])[2:].view(2, -1, 17).expand(3, -1, -1, -1)
        return self.one(repeated), repeated.transpose(1, 2).repeat(1, 1, 8).sum(1), self.norm(tail)


def test_rows_that_are_a_multiple_of_a_size(agree: Callable[..., None]) -> None:
    """A branch for one row would hold a size of zero: TVM's analysis found a division by it."""
    agree(Repeated(), (torch.randn(5, 17),), [{0: "rows"}], [(torch.randn(rows, 17),) for rows in (2, 3, 40)])


@pytest.mark.parametrize(("n", "k", "columns"), [(5, 3, 4), (8, 2, 4), (1, 1, 48)])
def test_packing_is_a_transpose_in_panels(n: int, k: int, columns: int) -> None:
    weight = np.arange(n * k, dtype=np.float32).reshape(n, k)
    packed = pack_weight(weight, columns)
    assert packed.shape == (-(-n // columns), k, columns)
    flat = packed.transpose(0, 2, 1).reshape(-1, k)
    assert np.array_equal(flat[:n], weight) and not flat[n:].any()


class Shapes(nn.Module):
    """Depths that are taken in parts, also uneven ones; rows read out of a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.uneven = nn.Linear(3072, 64), nn.Linear(2909, 50)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.deep(x)), self.uneven(x[:, 7:2916])


def test_deep_products(agree: Callable[..., None]) -> None:
    more = [(torch.randn(rows, 3072),) for rows in (1, 4, 50)]
    agree(Shapes(), (torch.randn(11, 3072),), [{0: "rows"}], more, atol=1e-5)


@pytest.mark.parametrize("level", ["cpu", "cpu:x86-64-v3"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_number_of_threads_gives_the_same_bits(level: str, dynamic: bool) -> None:
    x = torch.randn(67, 2100)
    x[5, 7], x[8, 9], x[66, 1] = torch.nan, torch.inf, -torch.inf
    shapes = {"input": {0: "rows"}} if dynamic else None
    program = capture(nn.Linear(2100, 101), (x,), dynamic_shapes=shapes)
    feed = {program.inputs[0].name: x.numpy()}
    runs = [compile_program(program, target=level, threads=n).session().run(None, feed)[0] for n in (1, 2, 3)]
    assert all(run.tobytes() == runs[0].tobytes() for run in runs[1:])
    assert np.array_equal(np.isnan(runs[0]), np.isnan(program(x)[0].detach().numpy()))


def test_shares_are_even() -> None:
    target = resolve_target("cpu:x86-64-v4", 2)
    for rows, n, k in [(49, 512, 2048), (197, 384, 1536), (196, 1024, 256), (3136, 64, 64), (128, 50257, 768)]:
        choice = configure(target, rows, n, k)
        unit, columns = choice.tile.rows * choice.row_shares, choice.tile.vectors * target.lanes * choice.panel_shares
        assert -(-rows // unit) * unit * -(-n // columns) * columns < 1.07 * rows * n
