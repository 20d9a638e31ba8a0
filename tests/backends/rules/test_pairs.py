"""Products of bfloat16 in pairs: packed, attention and convolution, as the instruction rounds and as float32 does.

`compile` checks every case: on a CPU without the instruction the same kernels run with float32 arithmetic in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of
from graphopt.backends import cpu
from graphopt.backends.rules.convolution import pack_filter_pairs
from graphopt.backends.rules.gemm import pack_pairs
from graphopt.backends.target import resolve_target, runnable
from graphopt.capture import capture
from graphopt.compile import Artifact, _trial
from graphopt.runtime.features import missing
from tests.backends.conftest import Cases

F = nn.functional
LEVEL = "cpu:x86-64-v4-bf16"
PAIRS = "pairs of bfloat16"


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def compiled(
    cases: Mapping[str, Any] | nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None, limit: float = 3e-5
) -> Artifact:
    """Compiled, checked against PyTorch at many sizes; every product is one of pairs."""
    module = cases if isinstance(cases, nn.Module) else Cases(cases)
    program = capture(module, inputs, dynamic_shapes=dynamic)
    artifact = graphopt.compile(program, target=LEVEL, threads=2)
    assert artifact.report["errors"]["main"] <= limit
    (variant,) = artifact.manifest.variants
    rules = {"packed-gemm", "fused-attention", "direct-convolution", "winograd", "batched-gemm"}
    products = [kernel for kernel in variant.kernels.values() if kernel.rule in rules]
    assert products and all(kernel.configuration.get("products") == PAIRS for kernel in products)
    return artifact


class Linears(nn.Module):
    """Linears of every shape on a part of the columns of x, in float32 over rounded numbers."""

    SHAPES = ((2, 1), (3, 15), (4, 16), (5, 17), (33, 47), (384, 48), (8, 49), (130, 97))

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(narrow(n, k), False) for k, n in self.SHAPES])
        self.bias = nn.Parameter(torch.randn(47))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for weight in self.weights:
            n, k = weight.shape
            bias = self.bias if n == 47 else None
            found[f"{k}x{n}"] = F.linear(x[:, :k].float(), weight.float(), bias)
        return found


@pytest.mark.parametrize("rows", [1, 5, 67, None])
def test_every_tail_of_rows_columns_and_depth(rows: int | None) -> None:
    dynamic = None if rows else {"x": {0: "rows"}}
    compiled(Linears(), (narrow(rows or 9, 384),), dynamic)


class Epilogues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(narrow(50, 24), False), nn.Parameter(narrow(24, 50), False)
        self.bias = nn.Parameter(torch.randn(50))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        h = F.gelu(F.linear(x.float(), self.up.float(), self.bias)).bfloat16()
        return F.linear(h.float(), self.down.float()) + residual, h


def test_epilogues_are_float32_and_rounded_in_the_kernel() -> None:
    artifact = compiled(Epilogues(), (narrow(2, 3, 24), torch.randn(2, 3, 24)), limit=2e-2)
    names = set(artifact.manifest.variants[0].kernels)
    assert {"gemm_50x24_gelu_to_copy", "gemm_24x50_add"} <= names


@pytest.mark.parametrize(("length", "depth"), [(6, 16), (37, 24), (300, 64)])
def test_attention(length: int, depth: int) -> None:
    """Weights are rounded to bfloat16: 2^-9 each."""
    shape = (1, 2, length, depth)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    mask[..., length // 2 + 1 :] = False
    cases = {
        "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        "added": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask.log()),
    }
    compiled(cases, (narrow(*shape), narrow(*shape), narrow(*shape)), limit=2e-2)


def test_attention_of_any_length() -> None:
    cases = {"own": lambda x: F.scaled_dot_product_attention(x, x, x)}
    compiled(cases, (narrow(1, 2, 9, 16),), {"a": {2: "length"}}, limit=2e-2)


class Images(nn.Module):
    """Taps, strides, padding, dilation and sizes of one to many tiles; deep ones run over rows of taps in parts."""

    CASES: tuple[tuple[int, int, int, dict[str, int]], ...] = (
        (8, 5, 3, {"padding": 1}),
        (6, 33, 3, {"stride": 2}),
        (8, 16, 1, {}),
        (8, 16, 1, {"stride": 2}),
    )

    def __init__(self) -> None:
        super().__init__()
        cases = (*self.CASES, (8, 4, 3, {"dilation": 2, "padding": 2}), (384, 48, 3, {"padding": 1}))
        self.options = [options for *_, options in cases]
        self.weights = nn.ParameterList([nn.Parameter(narrow(o, c, t, t), False) for c, o, t, _ in cases])
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for weight, options in zip(self.weights, self.options, strict=True):
            bias = self.bias if weight.shape[0] == 16 else None
            found.append(F.conv2d(x[:, : weight.shape[1]].float(), weight.float(), bias, **options))
        return tuple(found)


@pytest.mark.parametrize("dynamic", [False, True])
def test_convolutions(dynamic: bool) -> None:
    compiled(Images(), (narrow(2, 384, 11, 13),), {"x": {0: "batch"}} if dynamic else None)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("taps", "options"), [(7, {"stride": 2, "padding": 3}), (3, {}), (4, {"stride": 4}), (2, {})])
def test_few_planes_pair_their_columns(channels: int, taps: int, options: dict[str, Any]) -> None:
    """Taps beside each other; an odd number of them reads a zero weight over a number that may be infinite."""
    weight = narrow(20, channels, taps, taps)
    x = narrow(2, channels, 12, 19)
    compiled({"image": lambda x: F.conv2d(x.float(), weight.float(), **options)}, (x,), {"a": {0: "batch"}})
    compiled(
        {"inner": lambda x: F.conv2d(x.permute(0, 3, 1, 2).float(), weight.float(), **options)},
        (x.permute(0, 2, 3, 1).contiguous(),),
    )


@pytest.mark.parametrize(("groups", "each", "outputs"), [(3, 2, 5), (2, 24, 40), (4, 16, 16)])
def test_groups_pair_their_own_channels(groups: int, each: int, outputs: int) -> None:
    weight, x = narrow(groups * outputs, each, 3, 3), narrow(1, groups * each, 9, 10)
    cases = {
        "padded": lambda x: F.conv2d(x.float(), weight.float(), padding=1, groups=groups),
        "strided": lambda x: F.conv2d(x.float(), weight.float(), stride=2, groups=groups),
    }
    compiled(cases, (x,))


def test_what_lies_beside_an_image_is_not_read() -> None:
    """The zero weight of an odd number of taps never meets an infinity of the next row."""
    weight, x = narrow(8, 3, 3, 3), narrow(1, 3, 9, 9)
    artifact = compiled({"cut": lambda x: F.conv2d(x[..., 1:-1].float(), weight.float())}, (x,))
    x[..., 0] = x[..., -1] = float("inf")
    (found,) = artifact.session().run(None, {artifact.session().get_inputs()[0].name: array_of(x)})
    assert np.isfinite(found).all()


def test_convolution_of_a_sequence() -> None:
    weight = narrow(12, 8, 5)
    compiled({"conv1d": lambda x: F.conv1d(x.float(), weight.float(), padding=2)}, (narrow(2, 8, 30),))


def test_packing_keeps_pairs_together() -> None:
    weight = np.arange(15, dtype=np.float32).reshape(5, 3).astype(ml_dtypes.bfloat16)
    packed = pack_pairs(weight, 4)
    assert packed.shape == (2, 2, 4, 2)
    flat = packed.transpose(0, 2, 1, 3).reshape(8, 4).astype(np.float32)
    assert np.array_equal(flat[:5, :3], weight.astype(np.float32)) and not flat[5:].any() and not flat[:, 3].any()
    filters = np.arange(48, dtype=np.float32).reshape(3, 4, 2, 2).astype(ml_dtypes.bfloat16)
    panels = pack_filter_pairs(filters, 1, 4)
    assert panels.shape == (1, 8, 4, 2)
    taps = panels.transpose(0, 2, 1, 3).reshape(4, 2, 2, 4)
    assert np.array_equal(taps[:3], filters.transpose(0, 2, 3, 1))


def test_the_instruction_and_its_stand_in_give_the_same_bits() -> None:
    """Other CPUs check a kernel with float32 arithmetic in the order of VDPBF16PS; also NaN, infinities and ties."""
    target = resolve_target(LEVEL, 2)
    if missing(target.features):
        pytest.skip(f"this CPU lacks {', '.join(missing(target.features))}, so the instruction cannot be run")
    module = Epilogues()
    x, residual = narrow(33, 24) * 3, torch.randn(33, 24)
    x[3, 5], x[7, 1], x[9, 9] = torch.nan, torch.inf, -torch.inf
    program = capture(module, (x, residual))
    artifact = graphopt.compile(capture(module, (narrow(33, 24), residual)), target=LEVEL, threads=2)
    stand_in = replace(runnable(target), extensions=())
    other = _trial(artifact, cpu.build(cpu.lower({"main": program}, target).module, stand_in))
    feed = {spec.name: array_of(value) for spec, value in zip(program.inputs, (x, residual), strict=True)}
    own, theirs = artifact.session().run(None, feed), other.session().run(None, feed)
    for left, right in zip(own, theirs, strict=True):
        np.testing.assert_array_equal(left, right)
