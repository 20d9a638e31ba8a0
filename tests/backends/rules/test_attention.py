"""Fused attention over awkward sizes, masks of every broadcast, and rows with nothing to attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

from graphopt.backends.cpu import lower
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.compile import Artifact, compile
from graphopt.optimize import optimize

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


def as_heads(scores: torch.Tensor, heads: int, flat: bool = False) -> torch.Tensor:
    """The gate [B, H, S, D or 1] of scores [B, S, H D or H]; `flat`: [B H, S, ...]."""
    gate = (torch.sigmoid(scores) * 2).unflatten(-1, (heads, -1)).permute(0, 2, 1, 3)
    return gate.flatten(0, 1) if flat else gate


class Gated(nn.Module):
    """Gates of one number a head and of one a channel behind each form of attention, read out of one product."""

    def __init__(self, heads: int, groups: int, width: int, value: int) -> None:
        super().__init__()
        self.sizes = [heads * width, groups * width, groups * value, heads, heads * value]
        self.heads, self.groups = heads, groups

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        *parts, few, many = x.split(self.sizes, -1)
        counts = (self.heads, self.groups, self.groups)
        q, k, v = (part.unflatten(-1, (count, -1)).transpose(1, 2) for part, count in zip(parts, counts, strict=True))
        s = x.shape[1]
        padding = keep[:, None, None, :] > 0
        full = padding & (torch.arange(s)[:, None] >= torch.arange(s)[None, :] - 2)
        results: dict[str, torch.Tensor] = {}
        for name, scores in (("few", few), ("many", many)):
            gate = as_heads(scores, self.heads)
            results |= {
                f"{name}_plain": attend(q, k, v, enable_gqa=True) * gate,
                f"{name}_causal": attend(q, k, v, is_causal=True, enable_gqa=True) * gate,
                f"{name}_padding": attend(q, k, v, attn_mask=padding, enable_gqa=True) * gate,
                f"{name}_full": attend(q, k, v, attn_mask=full, enable_gqa=True) * gate,
                f"{name}_decoding": attend(q[:, :, -1:], k, v, enable_gqa=True) * gate[:, :, -1:],
            }
        for name, gate in (("joined", torch.sigmoid(many)), ("each_row", torch.sigmoid(few[..., :1]))):
            results[name] = attend(q, k, v, enable_gqa=True).transpose(1, 2).contiguous().flatten(2) * gate
        return results


GATED_SIZES = [(1, 1), (2, 7), (1, 31), (3, 33), (1, 257), (1, 300)]


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(4, 2, 32, 32), (3, 3, 12, 20), (2, 1, 16, 1)])
def test_gates_behind_every_form(counts: tuple[int, int, int, int], agree: Callable[..., Any]) -> None:
    """Whole vectors, parts of vectors, one value a head; several blocks of keys at the larger sizes."""
    module = Gated(*counts)

    def inputs(b: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.ones(b, s)
        keep[:, s // 2 + 1 :] = 0
        return torch.randn(b, s, sum(module.sizes)), keep

    run = agree(module, inputs(2, 12), [{0: "b", 1: "s"}] * 2, [inputs(*sizes) for sizes in GATED_SIZES])
    kernels = run.artifact.manifest.variants[0].kernels
    fused = [name for name, kernel in kernels.items() if kernel.rule == "fused-attention"]
    assert fused and all("mul" in name for name in fused)


class FlatGates(nn.Module):
    """Batch and heads share an axis, or one sequence has heads alone."""

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        both = heads.flatten(0, 1)
        few, many = (as_heads(part, 4, flat=True) for part in (scores[..., :4], scores))
        single, gate = heads[0], as_heads(scores[:1], 4)[0]
        return {
            "few": attend(both, both, both) * few,
            "many": attend(both, both, both) * many,
            "heads": attend(single, single, single, enable_gqa=True) * gate,
        }


def test_gates_where_batch_and_heads_share_an_axis(agree: Callable[..., Any]) -> None:
    def inputs(b: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(b, s, 64), torch.randn(b, s, 64)

    agree(FlatGates(), inputs(2, 12), [{0: "b", 1: "s"}] * 2, [inputs(*sizes) for sizes in GATED_SIZES])


def rules_of(artifact: Artifact) -> list[str]:
    return [kernel.rule for kernel in artifact.manifest.variants[0].kernels.values()]


class GatedApart(nn.Module):
    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        few, many = as_heads(scores[..., :1], 1), as_heads(scores, 1)
        return {"few": attend(x, x, x, is_causal=True) * few, "many": attend(x, x, x) * many}


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_gates_of_fixed_sizes(target: str) -> None:
    """Equal bits for one thread and for two: 300 keys are two blocks, one head's rows are shared out."""
    inputs = torch.randn(1, 1, 300, 40), torch.randn(1, 300, 40)
    program = capture(GatedApart(), inputs)
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    one, two = (compile(program, target=target, threads=n).session().run(None, feed) for n in (1, 2))
    for first, second, want in zip(one, two, program(*inputs), strict=True):
        assert (first == second).all()
        torch.testing.assert_close(torch.from_numpy(first), want, rtol=2e-5, atol=2e-6)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (make(x).unflatten(-1, (4, -1)).transpose(1, 2) for make in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", ["headwise", "elementwise"])
def test_a_gate_takes_no_kernel(mode: str) -> None:
    plain = capture(SelfAttention().eval(), (torch.randn(2, 9, 64),))
    gated = optimize(plain, f"gated-attention{{mode={mode}}}").program
    counts = [rules_of(compile(optimize(program, "O2").program)) for program in (plain, gated)]
    assert counts == [["packed-gemm", "fused-attention", "packed-gemm"]] * 2


class Rooted(nn.Module):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x) * torch.sqrt(gate)


@pytest.mark.parametrize("vectors", [1, 4])
def test_a_gate_of_heads_is_computed_once_for_a_tile_of_rows(vectors: int) -> None:
    """In one vector that holds all rows of the tile, however many vectors of channels each row has."""
    program = capture(Rooted(), (torch.randn(1, 2, 9, 16 * vectors), torch.rand(1, 2, 9, 1) + 1))
    module = lower({"main": program}, resolve_target("cpu:x86-64-v4", threads=1)).module
    (kernel,) = (f for name, f in module.functions.items() if name.name_hint.startswith("attention"))
    assert kernel.script().count("sqrt") == 1
