"""Matrix products with constant and computed factors, with their epilogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Check = Callable[..., None]


def test_products_of_two_inputs(agree: Check) -> None:
    cases: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "matmul": lambda x, y: x @ y,
        "batched": lambda x, y: x.expand(4, 3, 5) @ y.expand(4, 5, 7),
        "broadcast": lambda x, y: x.expand(2, 1, 3, 5) @ y.expand(4, 5, 7),
        "vector_right": lambda x, y: x @ y[:, 0],
        "vector_left": lambda x, y: x[0] @ y,
        "vectors": lambda x, y: x[0] @ y[:, 1],
        "bmm": lambda x, y: torch.bmm(x.unsqueeze(0), y.unsqueeze(0)),
        "addmm": lambda x, y: torch.addmm(y[0], x, y, beta=0.5, alpha=2),
        "baddbmm": lambda x, y: torch.baddbmm(y[0], x.expand(2, 3, 5), y.expand(2, 5, 7), beta=2, alpha=0.5),
        "linear": lambda x, y: F.linear(x, y.t(), y[0]),
        "transposed": lambda x, y: y.t() @ x.t(),
        "einsum": lambda x, y: torch.einsum("ik,kj->ji", x, y),
        "einsum_batched": lambda x, y: torch.einsum("bik,kj->bij", x.expand(2, 3, 5), y),
        "outer": lambda x, y: torch.outer(x[0], y[0]),
        "double": lambda x, y: x.double() @ y.double(),
        "half": lambda x, y: x.half() @ y.half(),
        "integers": lambda x, y: (x * 9).long() @ (y * 9).long(),
        "scaled": lambda x, y: torch.softmax(x @ y / 2.0, -1),
    }
    agree(cases, [torch.randn(3, 5), torch.randn(5, 7)])


class Weights(nn.Module):
    """Constant factors of awkward sizes, each with another epilogue."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain = nn.Linear(width, 50)
        self.bare = nn.Linear(width, 7, bias=False)
        self.wide = nn.Linear(width, 97)
        self.one = nn.Linear(width, 1)
        self.matrix = nn.Parameter(torch.randn(width, 33))
        self.bias = nn.Parameter(torch.randn(33))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        wide = self.wide(x)
        return {
            "plain": self.plain(x),
            "gelu": F.gelu(self.plain(x)),
            "residual": self.bare(x) + x[..., :7],
            "one": self.one(x).squeeze(-1),
            "twice": wide * torch.sigmoid(wide),
            "matmul": x @ self.matrix,
            "addmm": torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.matrix),
            "left": self.matrix.t() @ x.transpose(-1, -2),
            "to_flags": self.bare(x) > 0,
        }


def test_constant_weights(agree: Check) -> None:
    width = 13
    more = [(torch.randn(n, m, width),) for n, m in [(1, 1), (1, 17), (3, 67)]]
    agree(Weights(width).eval(), [torch.randn(2, 5, width)], [{0: "batch", 1: "seq"}], more, atol=1e-5)


class Empty(nn.Module):
    """A constant weight without rows: a sum of nothing is the bias alone."""

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(0, 3))
        self.register_buffer("bias", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x[:, 2:2], self.weight)


def test_empty_weight(agree: Check) -> None:
    agree({"empty": Empty()}, [torch.randn(3, 5)])


def test_vector_by_constant_matrix(agree: Check) -> None:
    weight = nn.Linear(6, 9)
    agree({"linear": weight, "matmul": lambda x: weight.weight @ x}, [torch.randn(6)])


def test_symbolic_product(agree: Check) -> None:
    cases: dict[str, Callable[[Tensor], Any]] = {
        "scores": lambda x: x @ x.transpose(1, 2),
        "context": lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
        "heads": lambda x: (
            x.view(x.shape[0], -1, 2, 4).transpose(1, 2) @ x.view(x.shape[0], -1, 2, 4).permute(0, 2, 3, 1)
        ),
    }
    agree(cases, [torch.randn(2, 5, 8)], [{0: "batch", 1: "seq"}], [(torch.randn(1, 1, 8),), (torch.randn(3, 19, 8),)])
