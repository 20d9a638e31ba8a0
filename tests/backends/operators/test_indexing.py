"""Gathers, concatenations, padding and triangles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Check = Callable[..., None]

READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "embedding": lambda x, i: F.embedding(i, x),
    "embedding_padding": lambda x, i: F.embedding(i, x, padding_idx=0),
    "index": lambda x, i: x[i],
    "index_negative": lambda x, i: x[i - 3],
    "index_second": lambda x, i: x[:, i],
    "index_pair": lambda x, i: x[i, i + 1],
    "index_broadcast": lambda x, i: x[i[:, :1], i + 1],
    "index_apart": lambda x, i: x.reshape(7, 3, 3)[i, :, i[:1] % 3],
    "index_middle": lambda x, i: x.reshape(7, 3, 3)[:, i % 3, i % 2],
    "index_select": lambda x, i: x.index_select(1, i[0]),
    "gather": lambda x, i: x.gather(1, i),
    "gather_rows": lambda x, i: x.gather(0, i),
    "take_along": lambda x, i: torch.take_along_dim(x[:2], i[:, :1], dim=1),
    "index_of_lazy": lambda x, i: (x * 2)[i] + 1,
    "int32": lambda x, i: F.embedding(i.int(), x),
}

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cat": lambda x, y: torch.cat([x, y]),
    "cat_last": lambda x, y: torch.cat([x, y[:2]], -1),
    "cat_one": lambda x, y: torch.cat([x], 1),
    "cat_five": lambda x, y: torch.cat([x, x + 1, x * 2, x[:, :1], x[:, 1:]], dim=1),
    "cat_views": lambda x, y: torch.cat([-x[..., 3:], x[..., :3]], -1),
    "cat_dtypes": lambda x, y: torch.cat([x.double(), y]),
    "stack": lambda x, y: torch.stack([x, y[:2]], 1),
    "stack_last": lambda x, y: torch.stack([x, x + 1, x + 2], -1),
    "pad": lambda x, y: F.pad(x, (1, 2)),
    "pad_two": lambda x, y: F.pad(x, (0, 3, 2, 0), value=1.5),
    "pad_negative": lambda x, y: F.pad(x, (-1, 2, 1, -1)),
    "tril": lambda x, y: x.tril(),
    "tril_diagonal": lambda x, y: x.tril(-1),
    "triu": lambda x, y: torch.triu(x, diagonal=2),
    "repeat": lambda x, y: x.repeat(2, 1, 3),
    "repeat_front": lambda x, y: x.repeat(2, 1, 1, 1),
    "tile": lambda x, y: x.tile((1, 2)),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, dim=1),
    "flip": lambda x, y: x.flip(0, -1),
    "roll": lambda x, y: x.roll(1, 1),
    "roll_two": lambda x, y: torch.roll(x, shifts=(-1, 2), dims=(0, 2)),
    "roll_flat": lambda x, y: torch.roll(x, 5),
    "diff": lambda x, y: x.diff(dim=1),
    "diff_prepend": lambda x, y: x.diff(prepend=x[..., :1]),
    "diff_flags": lambda x, y: (x > 0).diff(append=(y > 0)[:2, :, :1]),
    "pixel_shuffle": lambda x, y: F.pixel_shuffle(x.reshape(1, 4, 3, 3), 2),
    "movedim": lambda x, y: x.movedim((0, 1), (2, 0)),
    "rotary": lambda x, y: x * y[:2].cos() + torch.cat([-x[..., 3:], x[..., :3]], -1) * y[:2].sin(),
}


def test_reading_positions(agree: Check) -> None:
    agree(READS, [torch.randn(7, 9), torch.tensor([[0, 1, 6], [3, 2, 5]])])


def test_concatenation_and_padding(agree: Check) -> None:
    agree(WRITES, [torch.randn(2, 3, 6), torch.randn(5, 3, 6)])


def test_integers(agree: Check) -> None:
    names = ("cat", "stack", "pad_negative", "tril", "repeat", "flip", "roll", "diff", "diff_flags")
    x, y = torch.randint(0, 99, (2, 3, 6)), torch.randint(0, 99, (5, 3, 6))
    agree({name: WRITES[name] for name in names}, [x, y])


def test_symbolic_sizes(agree: Check) -> None:
    cases: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "cat": lambda x, i: torch.cat([x, x[:, :1], x + 1], dim=1),
        "cat_batch": lambda x, i: torch.cat([x, x * 2]),
        "prefix": lambda x, i: torch.cat([x[:1, :1].expand(x.shape[0], -1, -1), x], 1),
        "pad": lambda x, i: F.pad(x, (1, 0, 2, 1)),
        "tril": lambda x, i: (x @ x.transpose(1, 2)).tril(),
        "triu": lambda x, i: torch.ones(x.shape[1], x.shape[1]).triu(1),
        "flip": lambda x, i: x.flip(1),
        "roll": lambda x, i: x.roll(1, 1),
        "positions": lambda x, i: F.embedding(torch.arange(x.shape[1]), torch.ones(64, 3).cumsum(0)),
        "gather": lambda x, i: x.gather(2, i.unsqueeze(-1)),
        "index": lambda x, i: x[torch.arange(x.shape[0]), i[:, 0] * 0],
        "last_token": lambda x, i: x[torch.arange(x.shape[0]), (i >= 0).sum(-1) - 1],
        "embedding": lambda x, i: F.embedding(i, torch.arange(12.0).view(4, 3)),
    }
    sizes = [(1, 1), (2, 17), (3, 2)]
    more = [(torch.randn(n, m, 4), torch.randint(0, 4, (n, m))) for n, m in sizes]
    axes = {0: "batch", 1: "seq"}
    agree(cases, [torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))], [axes, axes], more)


def test_positions_outside_stay_inside_memory(compiled: Callable[..., Any]) -> None:
    """Wrong ids read the nearest row, negative ones count from the end, as docs/numerics.md says."""
    table = torch.arange(8.0).view(4, 2)
    run = compiled({"rows": lambda ids: F.embedding(ids, table)}, [torch.tensor([0, 1, 2, 3, 0])])
    (rows,) = run(torch.tensor([-1, -9, 4, 10**12, 3]))
    assert torch.equal(rows, table[[3, 0, 3, 3, 3]])
