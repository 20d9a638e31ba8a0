"""Operators that only change how memory is read, of stored and of lazy tensors, at fixed and symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., None]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.reshape(2, -1),
    "flatten": lambda x: x.flatten(1, 2),
    "unflatten": lambda x: x.unflatten(2, (2, -1)),
    "unsqueeze": lambda x: x.unsqueeze(-1).unsqueeze(0),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze_all": lambda x: x[:, :1].squeeze(),
    "permute": lambda x: x.permute(2, 0, -2),
    "transpose": lambda x: x.transpose(-1, 0),
    "transpose_then_view": lambda x: x.transpose(1, 2).reshape(-1),
    "matrix_transpose": lambda x: x[0].t(),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, 2),
    "swap_lazy": lambda x: (x * 2).transpose(0, 1) + 1,
    "expand": lambda x: x[:, :1].expand(-1, 4, -1),
    "expand_front": lambda x: x.expand(2, -1, -1, -1),
    "expand_lazy": lambda x: (x[:1] + 1).expand(5, -1, -1) * 2,
    "meshgrid": lambda x: list(torch.meshgrid(x[0, 0], x[0, :, 0] + 1, x[:, 0, 0], indexing="ij")),
    "meshgrid_xy": lambda x: list(torch.meshgrid(x[0, 0], x[0, :, 0] + 1, indexing="xy")),
    "slice": lambda x: x[:, 1:3],
    "slice_negative": lambda x: x[:, -2:, -3:-1],
    "slice_over": lambda x: x[-100:100, 1:1000],
    "slice_step": lambda x: x[:, ::2, 1::3],
    "slice_empty_start": lambda x: x[:, 2:][:, :1],
    "select": lambda x: x[1],
    "select_last": lambda x: x[:, -1],
    "select_both": lambda x: x[-1, :, 2],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "split": lambda x: list(x.split(2, dim=1)),
    "split_sizes": lambda x: list(x.split([1, 3, 2], dim=-1)),
    "chunk": lambda x: list(x.chunk(2, dim=2)),
    "unbind": lambda x: list(x.unbind(1)),
    "unbind_last": lambda x: sum(x.unbind(-1)),
    "view_of_slice": lambda x: x[:, 1:].reshape(2, -1),
    "view_of_step": lambda x: x[:, :, ::2].reshape(2, -1),
    "diagonal_read": lambda x: x.permute(1, 0, 2)[1:, :, ::2].flatten(),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().view(-1),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "view_as_pairs": lambda x: x.reshape(2, 3, 3, 2)[..., 0] + 1,
    "tile": lambda x: x.tile((1, 2, 1)),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:1, :1])[1] + x,
}

DYNAMIC: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.reshape(x.shape[0], x.shape[1], 2, 4),
    "merge": lambda x: x.reshape(-1, 8),
    "heads": lambda x: x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) + 1,
    "heads_back": lambda x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "flatten": lambda x: x.flatten(),
    "transpose": lambda x: x.transpose(0, 1),
    "select": lambda x: x[:, 0],
    "select_last": lambda x: x[:, -1],
    "slice": lambda x: x[:, :-1],
    "slice_tail": lambda x: x[:, -1:],
    "slice_half": lambda x: x[..., :4] - x[..., 4:],
    "expand": lambda x: x[:, :1].expand(-1, x.shape[1], -1) + x,
    "chunk": lambda x: list(x.chunk(2, dim=-1)),
    "unsqueeze": lambda x: x[:, None, :, None] * 2,
}


def test_views(agree: Check) -> None:
    agree(CASES, [torch.randn(2, 3, 6)])


def test_views_of_integers(agree: Check) -> None:
    agree({n: CASES[n] for n in ("permute", "slice_negative", "unbind", "expand")}, [torch.randint(0, 9, (2, 3, 6))])


def test_symbolic_sizes(agree: Check) -> None:
    more = [(torch.randn(n, m, 8),) for n, m in [(1, 1), (1, 2), (3, 17), (16, 1)]]
    agree(DYNAMIC, [torch.randn(2, 5, 8)], [{0: "batch", 1: "seq"}], more)


def test_inputs_and_their_views_as_outputs(agree: Check) -> None:
    """Outputs have memory of their own, even where they are an input, a weight or each other."""
    agree({"input": lambda x: x, "again": lambda x: x, "view": lambda x: x.view(-1)}, [torch.randn(2, 3)])
