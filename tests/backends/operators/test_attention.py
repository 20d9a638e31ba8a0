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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_floats(agree: Check, dtype: torch.dtype) -> None:
    cases = {
        "plain": lambda q, k: attend(q, q, q),
        "causal": lambda q, k: attend(q, q, q, is_causal=True),
        "grouped": lambda q, k: attend(q, k, k, enable_gqa=True),
        "mask": lambda q, k: attend(q, q, k.repeat(1, 2, 1, 1), attn_mask=q[0, 0] @ q[0, 0].mT > 0, scale=0.3),
        "bias": lambda q, k: attend(q, q, q, attn_mask=q @ q.mT),
        "rank_3": lambda q, k: attend(q[0], q[0], q[0]),
    }
    axes = {0: "batch", 2: "seq"}
    more = [(torch.randn(3, 4, 7, 8).to(dtype), torch.randn(3, 2, 7, 8).to(dtype))]
    agree(cases, [torch.randn(2, 4, 6, 8).to(dtype), torch.randn(2, 2, 6, 8).to(dtype)], [axes, axes], more)


class Rotary(torch.nn.Module):
    """Grouped queries as Llama writes them: halves of queries and keys turned, keys and values repeated."""

    cos: Tensor
    sin: Tensor

    def __init__(self, heads: int = 4, groups: int = 2, width: int = 8, read_again: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.read_again = heads, groups, width, read_again
        self.qkv = torch.nn.Linear(16, (heads + 2 * groups) * width)
        angles = torch.arange(64)[:, None] / 10 ** torch.arange(width // 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1))
        self.register_buffer("sin", torch.cat([angles.sin(), angles.sin()], -1))

    def forward(self, x: Tensor) -> Any:
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=-1))
        q, k = self.turn(q), self.turn(k)
        k, v = self.repeat(k), self.repeat(v)
        found = attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return (found, k) if self.read_again else found

    def turn(self, x: Tensor) -> Tensor:
        length, half = x.shape[2], self.width // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[:length] + turned * self.sin[:length]

    def repeat(self, x: Tensor) -> Tensor:
        batch, groups, length, width = x.shape
        repeats = self.heads // groups
        return x[:, :, None].expand(batch, groups, repeats, length, width).reshape(batch, -1, length, width)


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (6, 2, 32), (6, 3, 10), (4, 1, 16)])
def test_rotary_grouped_queries_take_a_kernel_each(
    compiled: Callable[..., Any], heads: int, groups: int, width: int
) -> None:
    x = torch.randn(2, 7, 16)
    module = Rotary(heads, groups, width).eval()
    run = compiled(module, [x])
    torch.testing.assert_close(run(x)[0], module(x))
    rules = [info.rule for info in run.artifact.manifest.variants[0].kernels.values()]
    assert sorted(rules) == ["fused-attention", "packed-gemm", "pointwise", "pointwise"]


def test_rotary_of_any_length(compiled: Callable[..., Any]) -> None:
    module = Rotary(4, 2, 32).eval()
    run = compiled(module, [torch.randn(2, 7, 16)], [{0: "batch", 1: "length"}])
    for shape in ((1, 1), (3, 33), (2, 64)):
        x = torch.randn(*shape, 16)
        torch.testing.assert_close(run(x)[0], module(x))


def test_repeated_keys_that_are_read_again_are_there(compiled: Callable[..., Any]) -> None:
    x, module = torch.randn(2, 7, 16), Rotary(read_again=True).eval()
    for found, expected in zip(compiled(module, [x])(x), module(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_keys_and_values_repeated_differently(compiled: Callable[..., Any]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8)
        values = v[:, :1, None].expand(2, 1, 4, 5, 8).reshape(2, 4, 5, 8)
        return attend(q, keys, values)

    inputs = [torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)]
    run = compiled({"attention": attention}, inputs)
    torch.testing.assert_close(run(*inputs)[0], attention(*inputs))
