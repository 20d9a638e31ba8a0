"""Transposition in blocks: tails of both axes, few rows, several operands, other readers of the same view, threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.backends.rules.transpose import merged
from graphopt.backends.values import Storage, View
from graphopt.capture import capture

Check = Callable[..., Any]
Case = Callable[[Tensor], Any]
CASES: dict[str, Case] = {
    "plain": lambda x: x.permute(0, 2, 1).contiguous(),
    "first": lambda x: x.permute(2, 1, 0).contiguous(),
    "cut": lambda x: x[:, 1:, :-1].permute(2, 0, 1).contiguous(),
    "computed": lambda x: F.gelu(x).permute(0, 2, 1).contiguous(),
    "added": lambda x: x.permute(0, 2, 1) + x.reshape(x.shape[0], x.shape[2], x.shape[1]),
    "broadcast": lambda x: (x + x[:, :1]).permute(2, 0, 1) * x[0, 0, 0],
    "flipped": lambda x: x.permute(0, 2, 1).flip(1) + x.permute(0, 2, 1),
    "twice": lambda x: x.permute(0, 2, 1) + (x * 2).permute(0, 2, 1) + x.permute(0, 2, 1).relu(),
    "reshaped": lambda x: x.permute(0, 2, 1).reshape(-1, x.shape[1]).exp().unsqueeze(0),
    "other types": lambda x: (x.double().permute(0, 2, 1) + 1, (x > 0).permute(2, 1, 0), x.half().permute(2, 0, 1)),
    "rounded": lambda x: x.permute(0, 2, 1).half(),
}
SIZES = (1, 3, 4, 17, 64, 67)


def rules(run: Any) -> set[str]:
    return {kernel.rule for kernel in run.artifact.manifest.variants[0].kernels.values()}


@pytest.mark.parametrize(("rows", "columns"), [(17, 131), (67, 64), (5, 19), (64, 3), (3, 31), (1, 40), (2, 2)])
def test_awkward_sizes(agree: Check, rows: int, columns: int) -> None:
    run = agree(CASES, [torch.randn(3, rows, columns)], rtol=1e-5)
    assert "transpose" in rules(run)


def test_every_pair_of_sizes(agree: Check) -> None:
    matrix = torch.randn(max(SIZES), max(SIZES))
    pairs = [(rows, columns) for rows in SIZES for columns in SIZES]
    cases = {f"{r} {c}": lambda x, r=r, c=c: x[:r, :c].reshape(r, c).t().contiguous() for r, c in pairs}
    agree(cases, [matrix], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_pixels(agree: Check, count: int) -> None:
    """Few channels, from and to channels last, and what is woven into larger images."""
    cases: dict[str, Case] = {
        "last": lambda x: x.permute(0, 2, 3, 1).contiguous(),
        "first": lambda x: x.reshape(2, 9, 37, count).permute(0, 3, 1, 2).contiguous(),
        "shuffled": lambda x: F.pixel_shuffle(x.reshape(-1, 37, 9, count).permute(0, 3, 1, 2).repeat(1, 9, 1, 1), 3),
        "windows": lambda x: x.reshape(2, count, 3, 3, 37).permute(0, 1, 3, 4, 2).contiguous(),
        "half": lambda x: x[:, :, ::2].permute(0, 2, 3, 1).contiguous(),
    }
    agree(cases, [torch.randn(2, count, 9, 37)], rtol=0, atol=0)


def test_symbolic_sizes(agree: Check) -> None:
    more = [
        (torch.randn(b, rows, columns),) for b, rows, columns in ((1, 70, 130), (2, 16, 17), (2, 5, 40), (3, 40, 3))
    ]
    cases = {name: CASES[name] for name in ("plain", "first", "computed", "twice", "flipped")}
    run = agree(cases, [torch.randn(2, 21, 33)], [{0: "b", 1: "n", 2: "m"}], more, rtol=1e-5)
    assert "transpose" in rules(run)
    agree(
        {"last": lambda x: x.permute(0, 2, 3, 1).contiguous()},
        [torch.randn(2, 3, 9, 7)],
        [{0: "b", 2: "h", 3: "w"}],
        [(torch.randn(1, 3, 20, 31),), (torch.randn(4, 3, 2, 2),)],
    )


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})
    x = torch.randn(3, 197, 131)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return CASES["plain"](x), CASES["computed"](x), x.reshape(3, 131, 197).permute(2, 0, 1).contiguous()

    program = capture(Module(), (x,))
    feed = {program.inputs[0].name: x.numpy()}
    one, two = (compiling.compile(program, target, threads=n).session().run(None, feed) for n in (1, 2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (one[0] == x.permute(0, 2, 1).numpy()).all()


def test_one_kernel_computes_and_transposes(compiled: Callable[..., Any]) -> None:
    run = compiled({"x": lambda x: torch.relu(x * 2).t().contiguous()}, [torch.randn(40, 50)])
    (kernel,) = run.artifact.manifest.variants[0].kernels.values()
    assert kernel.rule == "transpose"


def test_neighbouring_axes_are_one() -> None:
    view = View(Storage(None, (2, 3, 4, 5), "float32"), (2, 4, 1, 5, 3), (60, 5, 7, 1, 20), 0)
    assert (merged(view).shape, merged(view).strides) == ((2, 20, 3), (60, 1, 20))
