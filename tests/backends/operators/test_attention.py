"""Scaled dot-product attention with every argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import CompileError

Check = Callable[..., None]
attend = F.scaled_dot_product_attention


def mask_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2])[None, :] <= torch.arange(q.shape[-2])[:, None] + 1


def turned(x: Tensor) -> Tensor:
    """The same values with heads inside rows in memory, as a projection leaves them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "plain": lambda q, k, v: attend(q, k, v),
    "scale": lambda q, k, v: attend(q, k, v, scale=0.3),
    "flags": lambda q, k, v: attend(q, k, v, attn_mask=mask_of(q, k)),
    "bias": lambda q, k, v: attend(q, k, v, attn_mask=mask_of(q, k).float()[None] * 2),
    "rank_3": lambda q, k, v: attend(q[0], k[0], v[0]),
    "rank_3_mask": lambda q, k, v: attend(q[0], k[0], v[0], attn_mask=q[0] @ k[0].mT),
    "nothing_to_see": lambda q, k, v: attend(
        q, k, v, attn_mask=mask_of(q, k) & (torch.arange(q.shape[-2]) > 0)[:, None]
    ),
    "infinite_bias": lambda q, k, v: attend(
        q, k, v, attn_mask=torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~mask_of(q, k), -math.inf)
    ),
    "views": lambda q, k, v: attend(turned(q), turned(k), turned(v)),
}


def test_arguments(agree: Check) -> None:
    agree(CASES, [torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 12)])


def test_shared_heads_and_causal(agree: Check) -> None:
    cases: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "causal": lambda q, k: attend(q, q, q, is_causal=True),
        "shared": lambda q, k: attend(q, k, k, enable_gqa=True),
    }
    more = [(torch.randn(n, 4, s, 8), torch.randn(n, 2, s, 8)) for n, s in [(1, 1), (3, 33)]]
    axes = {0: "batch", 2: "seq"}
    agree(cases, [torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)], [axes, axes], more)


def test_a_dynamic_batch_of_one_head(agree: Check) -> None:
    cases: dict[str, Callable[[Tensor], Any]] = {
        "rank_3": lambda x: attend(x, x, x),
        "mask": lambda x: attend(x, x, x, attn_mask=x @ x.mT),
    }
    agree(cases, [torch.randn(3, 5, 8)], [{0: "batch", 1: "seq"}], [(torch.randn(1, 9, 8),)])


@pytest.mark.parametrize("axis", [1, 3])
def test_a_dynamic_number_of_heads_or_depth_is_refused(axis: int, compiled: Callable[..., Any]) -> None:
    with pytest.raises(CompileError, match="fixed ones have a lowering"):
        compiled({"attention": lambda q: attend(q, q, q)}, [torch.randn(1, 3, 5, 8)], [{axis: "size"}])


def test_float64_is_refused(compiled: Callable[..., Any]) -> None:
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(CompileError, match="attends over float64"):
        compiled({"attention": lambda q: attend(q, q, q)}, [x])
