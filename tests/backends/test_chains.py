"""Long and deep element-wise graphs lower in bounded time, and to few kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


def repeated(step: Callable[[torch.Tensor, int], torch.Tensor], count: int) -> Function:
    def run(x: torch.Tensor) -> torch.Tensor:
        for number in range(count):
            x = step(x, number)
        return x

    return run


CHAINS: dict[str, Function] = {
    "relu": repeated(lambda x, n: torch.relu(x + 0.1 * n), 8),
    "clamp": repeated(lambda x, n: torch.clamp(x + 0.1, -2, 2), 4),
    "square": repeated(lambda x, n: x * x * 0.9, 12),
    "sine": repeated(lambda x, n: torch.sin(x) + 0.1, 100),
    "integers": repeated(lambda x, n: (x.long() + n) * (x.long() - 1) % 7, 6),
}


def test_chains_of_every_kind(agree: Callable[..., object]) -> None:
    agree(CHAINS, (torch.randn(3, 37),))


def test_first_parts_leave_a_graph(agree: Callable[..., object]) -> None:
    cases = {
        "slice": lambda x: (x * 2)[:1],
        "chunk": lambda x: (x + 1).chunk(2)[0],
        "unbind": lambda x: (x * 3).unbind(0)[0],
    }
    agree(cases, (torch.randn(4, 9),))


def test_slices_from_the_end_by_a_size(agree: Callable[..., object]) -> None:
    def tail(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:, -y.shape[0] :]

    more = [(torch.randn(2, 9), torch.randn(9)), (torch.randn(2, 11), torch.randn(1))]
    agree({"tail": tail}, (torch.randn(2, 12), torch.randn(5)), [{1: "s"}, {0: "n"}], more)


def test_attention_broadcasts_batch_and_heads(agree: Callable[..., object]) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    full, one_batch, one_head = torch.randn(3, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(3, 1, 5, 16)
    cases = {
        "keys": lambda q, k, v: attend(q, k, k),
        "values": lambda q, k, v: attend(q, q, v),
        "query": lambda q, k, v: attend(v, q, q),
    }
    agree(cases, (full, one_batch, one_head))
