"""Products of two computed tensors over awkward sizes, strides and batches, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu
from graphopt.backends.rules import batched_gemm
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.compile import compile as compile_program
from graphopt.program import Program


class Products(nn.Module):
    """x [b, m, k] and y [b, n, k] in every arrangement; k is a multiple of 2."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        b, m, _ = x.shape
        heads = x.view(b, m, 2, -1).transpose(1, 2) @ y.view(b, -1, 2, x.shape[2] // 2).permute(0, 2, 3, 1)
        return {
            "right transposed": x @ y.transpose(1, 2),
            "left transposed": x.transpose(1, 2) @ x,
            "right shared": x @ y[0].t(),
            "left shared": x[0] @ y.transpose(1, 2),
            "heads": torch.softmax(heads, -1),
            "epilogue": torch.relu(x @ y.transpose(1, 2) * 0.5 + 1),
            "twice": (x @ y.transpose(1, 2)) @ y,
            "einsum": torch.einsum("bmk,bnk->bnm", x, y),
            "scaled": torch.baddbmm(x[:, :, :1], x, y.transpose(1, 2), beta=0.5, alpha=2),
            "linear": nn.functional.linear(x, y[0], y[0, :, 0]),
        }


def test_sizes_known_at_run_time(agree: Callable[..., None]) -> None:
    sizes = [(1, 1, 2), (3, 8, 16), (1, 67, 49), (2, 130, 97)]
    more = [(torch.randn(b, m, 6), torch.randn(b, n, 6)) for b, m, n in sizes]
    inputs = (torch.randn(2, 5, 6), torch.randn(2, 7, 6))
    agree(Products(), inputs, [{0: "b", 1: "m"}, {0: "b", 1: "n"}], more, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 130, 64, 61), (3, 17, 38, 96)])
def test_sizes_known_before(agree: Callable[..., None], sizes: tuple[int, int, int, int]) -> None:
    b, m, k, n = sizes
    agree(Products(), (torch.randn(b, m, k), torch.randn(b, n, k)), atol=1e-5)


def products(m: int, n: int) -> Program:
    return capture(Products(), (torch.randn(1, m, 36), torch.randn(1, n, 36)))


def test_rule_is_used_for_every_product() -> None:
    lowered = cpu.lower({"main": products(9, 20)}, resolve_target("cpu"))
    rules = {kernel.rule for kernel in lowered.kernels.values()}
    assert batched_gemm.RULE in rules and "generic" not in rules


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ y.transpose(1, 2), x[0] @ y[0, :36]


@pytest.mark.parametrize("level", ["cpu", "cpu:x86-64-v3"])
def test_any_number_of_threads_gives_the_same_bits(level: str) -> None:
    x, y = torch.randn(1, 77, 36), torch.randn(1, 40, 36)
    x[0, 3, 5], y[0, 2, 1] = torch.nan, torch.inf
    program = capture(Pair(), (x, y))
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, (x, y), strict=True)}
    runs = [compile_program(program, target=level, threads=threads).session().run(None, feed) for threads in (1, 2, 3)]
    assert all(a.tobytes() == b.tobytes() for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    for got, want in zip(runs[0], program(x, y), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, equal_nan=True)


def test_rows_are_shared_out_where_tasks_are_few() -> None:
    target = resolve_target("cpu", 4)
    assert batched_gemm.configure(target, 1, 512, 16, 64).row_shares == 4
    assert batched_gemm.configure(target, 8, 512, 16, 64).row_shares == 1
