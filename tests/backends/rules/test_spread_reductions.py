"""Reductions spread over their rows again: one kernel where it may be, PyTorch's numbers everywhere."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from tests.backends.conftest import Cases

F = nn.functional
Check = Callable[..., Any]
Case = Callable[..., Any]


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def in_float(x: Tensor, weight: Tensor) -> Tensor:
    """x is narrow: squared in float32 and rounded before the weight, as language models do."""
    wide = x.to(torch.float32)
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


ONE_KERNEL: dict[str, Case] = {
    "rsqrt": root_mean_square,
    "quotient_of_root": lambda x, w: w * (x * (1 / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))),
    "divided_by_root": lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
    "dropped_axis": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).unsqueeze(-1)),
    "narrow_result": lambda x, w: w.half() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).half(),
    "expanded": lambda x, w: x * x.norm(dim=-1, keepdim=True).clamp_min(1e-3).expand_as(x) - w,
    "normalize": lambda x, w: F.normalize(x, dim=-1),
    "normalize_sums": lambda x, w: F.normalize(x, p=1.0, dim=-1) + w,
    "centred": lambda x, w: x - x.mean(-1, keepdim=True),
    "centred_squares": lambda x, w: (x - x.sum(-1, keepdim=True) * 0.1).square() * w,
    "gate": lambda x, w: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "scaled_by_largest": lambda x, w: x / (x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127),
    "from_lowest": lambda x, w: x - x.amin(-1, keepdim=True),
    "rounded": lambda x, w: torch.round(x / (x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127)),
    "half": lambda x, w: x.half() - x.half().mean(-1, keepdim=True),
    "product": lambda x, w: x - x.prod(-1, keepdim=True),
    "earlier_numbers_of_rows": lambda x, w: (first := x[..., :1]) + x * (x.sum(-1, keepdim=True) * first + 1),
}

MORE_KERNELS: dict[str, Case] = {
    "other_reader": lambda x, w: (x * (mean := x.mean(-1, keepdim=True)), mean),
    "first_axis": lambda x, w: x - x.mean(0, keepdim=True),
    "two_axes": lambda x, w: x - x.mean((-1, -2), keepdim=True),
    "later_factor": lambda x, w: x.mean(-1, keepdim=True) * torch.cumsum(x, 1),
    "later_sum": lambda x, w: x * x.mean(-1, keepdim=True) * (1.0 + w),
    "two_results": lambda x, w: (x * (mean := x.mean(-1, keepdim=True)), x + mean),
    "truth": lambda x, w: torch.where(x.mean(-1, keepdim=True) > 0, x, w),
    "doubles": lambda x, w: x.double() - x.double().mean(-1, keepdim=True),
}


def kernels(case: Case, *inputs: Tensor, dynamic: dict[str, dict[int, str]] | None = None) -> list[str]:
    """The rule of every kernel that the case becomes."""
    program = capture(Cases({"case": case}), inputs, dynamic_shapes=dynamic)
    lowered = cpu.lower({"main": program}, resolve_target("cpu", threads=2))
    return [kernel.rule for kernel in lowered.kernels.values()]


@pytest.mark.parametrize("shape", [(2, 5, 37), (1, 1, 96), (4, 4, 5), (1, 3, 2), (3, 7, 131)])
def test_numbers(agree: Check, shape: tuple[int, ...]) -> None:
    agree({**ONE_KERNEL, **MORE_KERNELS}, [torch.randn(*shape), torch.randn(shape[-1])], atol=2e-5)


@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (96,), (2, 3, 2, 16)])
def test_numbers_of_other_ranks(agree: Check, shape: tuple[int, ...]) -> None:
    cases = {name: ONE_KERNEL[name] for name in ("rsqrt", "dropped_axis", "normalize", "from_lowest", "gate")}
    agree(cases, [torch.randn(*shape), torch.randn(shape[-1])], atol=2e-5)


def test_numbers_of_symbolic_sizes(agree: Check) -> None:
    cases = {name: case for name, case in ONE_KERNEL.items() if name != "product"}
    more = [(torch.randn(b, s, n), torch.randn(n)) for b, s, n in ((1, 2, 3), (3, 1, 64), (5, 7, 131), (2, 2, 16))]
    dynamic = {0: "b", 1: "s", 2: "n"}, {0: "n"}
    agree(cases, [torch.randn(2, 5, 37), torch.randn(37)], dynamic, more, atol=5e-5)


def test_narrow_rows_normalised_in_float(agree: Check) -> None:
    agree({"norm": in_float}, [torch.randn(2, 5, 37).half(), torch.randn(37)])


def test_numbers_of_rows_read_along_columns(agree: Check) -> None:
    """The rows' means are the columns' factors where the tensor is square."""
    x = torch.randn(5, 5)
    agree({"factors": lambda x: x * x.mean(-1)}, [x])
    assert len(kernels(lambda x: x * x.mean(-1), x)) == 2


@pytest.mark.parametrize("name", ["rsqrt", "scaled_by_largest", "from_lowest", "centred"])
def test_numbers_that_are_none(agree: Check, name: str) -> None:
    x = torch.randn(6, 37)
    x[0, 3], x[1, 36], x[2, 0], x[3] = math.nan, math.inf, -math.inf, 0
    agree({name: ONE_KERNEL[name]}, [x, torch.randn(37)])


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_one_kernel(name: str) -> None:
    assert kernels(ONE_KERNEL[name], torch.randn(2, 5, 37), torch.randn(37)) == ["row-reduction"]


def test_one_kernel_of_symbolic_sizes() -> None:
    dynamic = {"a": {0: "b", 1: "s", 2: "n"}, "b": {0: "n"}}
    assert kernels(root_mean_square, torch.randn(2, 5, 37), torch.randn(37), dynamic=dynamic) == ["row-reduction"]


@pytest.mark.parametrize("name", MORE_KERNELS)
def test_more_kernels(name: str) -> None:
    assert len(kernels(MORE_KERNELS[name], torch.randn(4, 4, 4), torch.randn(4))) > 1


def test_few_long_rows_are_shared_out_in_pieces() -> None:
    assert len(kernels(ONE_KERNEL["divided_by_root"], torch.randn(2, 1 << 16), torch.randn(1 << 16))) == 3


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})
    inputs = torch.randn(67, 1201), torch.randn(1201)
    program = capture(Cases(ONE_KERNEL), inputs)
    feed = {spec.name: x.numpy() for spec, x in zip(program.inputs, inputs, strict=True)}
    one, two = (compiling.compile(program, threads=n).session().run(None, feed) for n in (1, 2))
    for a, b, name in zip(one, two, ONE_KERNEL, strict=True):
        assert (a == b).all(), name
