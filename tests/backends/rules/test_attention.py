"""Fused attention over awkward sizes, masks of every broadcast, and rows with nothing to attend to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

from graphopt.capture import capture
from graphopt.compile import compile

SIZES = [(1, 1), (2, 7), (1, 31), (1, 32), (3, 33), (1, 130), (1, 257), (1, 523)]


class Forms(nn.Module):
    """Heads of 16 and of 20 values; no mask, causal, key padding as flags and as numbers, a full mask, other scales."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        b, s, _ = x.shape
        q, k, v = (x[..., i * 60 : (i + 1) * 60].view(b, s, 3, 20).transpose(1, 2) for i in range(3))
        wide = x.view(b, s, 3, 60)[..., :16].transpose(1, 2)
        padding = keep[:, None, None, :] > 0
        full = padding & (torch.arange(s)[:, None] >= torch.arange(s)[None, :] - 2)
        return {
            "plain": attend(q, k, v),
            "causal": attend(q, k, v, is_causal=True),
            "padding": attend(q, k, v, attn_mask=padding),
            "numbers": attend(q, k, v, attn_mask=torch.where(padding, 0.0, -1e4)),
            "full": attend(q, k, v, attn_mask=full),
            "scaled": attend(wide, wide, wide, scale=0.3),
            "merged": attend(q, k, v).transpose(1, 2).reshape(b, s, 60),
        }


def test_every_form(agree: Callable[..., None]) -> None:
    def inputs(b: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.ones(b, s)
        keep[:, s // 2 + 1 :] = 0
        return torch.randn(b, s, 180), keep

    agree(Forms(), inputs(2, 12), [{0: "b", 1: "s"}] * 2, [inputs(*size) for size in SIZES])


class Cross(nn.Module):
    def forward(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return attend(q, kv, kv, enable_gqa=True)


def test_grouped_heads_and_other_lengths(agree: Callable[..., None]) -> None:
    more = [(torch.randn(1, 6, n, 64), torch.randn(1, 2, m, 64)) for n, m in [(1, 1), (5, 40), (9, 3)]]
    agree(Cross(), (torch.randn(1, 6, 4, 64), torch.randn(1, 2, 11, 64)), [{2: "n"}, {2: "m"}], more)


class Whole(nn.Module):
    """Depths of whole vectors, read where they are; heads in groups; every mask."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        full = (keep[:, None, None, :] > 0) & (
            torch.arange(q.shape[2])[:, None] != torch.arange(k.shape[2])[None, :] - 1
        )
        return {
            "plain": attend(q, k, k, enable_gqa=True),
            "causal": attend(q, k, k, is_causal=True, enable_gqa=True),
            "padding": attend(q, k, k, attn_mask=torch.where(keep > 0, 0.0, -1e4)[:, None, None, :], enable_gqa=True),
            "full": attend(q, k, k, attn_mask=full, enable_gqa=True),
            "negative": attend(q, k, k, scale=-0.2, enable_gqa=True),
        }


def whole(b: int, s: int, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = torch.ones(b, t)
    keep[:, t // 2 + 1 :] = 0
    return torch.randn(b, 4, s, 32), torch.randn(b, 2, t, 32), keep


AXES = [{0: "b", 2: "s"}, {0: "b", 2: "t"}, {0: "b", 1: "t"}]
PAIRS = [(1, 1, 1), (2, 1, 300), (1, 1, 16), (1, 9, 300), (1, 300, 9), (1, 263, 513), (3, 197, 197)]


def test_whole_vectors_in_several_blocks(agree: Callable[..., None]) -> None:
    agree(Whole(), whole(2, 5, 11), AXES, [whole(*sizes) for sizes in PAIRS])


class Fixed(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"plain": attend(q, k, k, enable_gqa=True), "causal": attend(q, k, k, is_causal=True, enable_gqa=True)}


@pytest.mark.parametrize(("rows", "keys", "target"), [(1, 40, "cpu"), (197, 197, "cpu"), (19, 300, "cpu:x86-64-v3")])
def test_fixed_sizes(rows: int, keys: int, target: str) -> None:
    q, k = torch.randn(2, 4, rows, 64), torch.randn(2, 2, keys, 64)
    program = capture(Fixed(), (q, k))
    results = compile(program, target=target).session().run(None, {"q": q.numpy(), "k": k.numpy()})
    for result, want in zip(results, program(q, k), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_threads_change_no_bit(causal: bool) -> None:
    """One head whose rows are shared out: 300 keys are two blocks."""
    q, k, v = (torch.randn(1, 1, 300, 40) for _ in range(3))
    program = capture(Apart(causal), (q, k, v))
    arrays = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}
    one, two = (compile(program, threads=n).session().run(None, arrays)[0] for n in (1, 2))
    assert (one == two).all()
    want = attend(q, k, v, is_causal=causal)
    torch.testing.assert_close(torch.from_numpy(one), want, rtol=2e-5, atol=2e-6)


class Masked(nn.Module):
    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x, attn_mask=keep)


def test_fully_masked_rows_are_zero() -> None:
    x, keep = torch.randn(1, 1, 5, 16), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    session = compile(capture(Masked(), (x, keep))).session()
    keep[..., 2, :] = False
    (result,) = session.run(None, {"x": x.numpy(), "keep": keep.numpy()})
    assert not result[0, 0, 2].any() and result[0, 0, [0, 1, 3, 4]].all()


class Apart(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, is_causal=self.causal)


def test_nan_stays_in_the_rows_it_reaches() -> None:
    """PyTorch's fused kernel gives 0 for a row of NaN scores, its plain one NaN, as here."""
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    program = capture(Apart(), (q, k, v))
    q = q.clone()
    q[0, 1, 3, 7] = torch.nan
    (result,) = compile(program).session().run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    missing = torch.from_numpy(result).isnan()
    assert missing[0, 1, 3].all() and missing.sum() == 16


def test_infinite_values_come_out_as_in_pytorch(agree: Callable[..., None]) -> None:
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    v[0, 0, 0, 0] = torch.inf
    agree(Apart(), (q, k, v))
