"""Normalisations and softmax, over the last and other axes, with and without parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Check = Callable[..., None]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm_weight": lambda x: F.layer_norm(x, (6,), torch.arange(6.0)),
    "layer_norm_bias": lambda x: F.layer_norm(x, (6,), torch.arange(6.0), torch.ones(6) * 2, 1e-2),
    "layer_norm_two": lambda x: F.layer_norm(x, (4, 6), eps=1e-3),
    "layer_norm_weights_two": lambda x: F.layer_norm(x, (4, 6), torch.arange(24.0).view(4, 6), torch.ones(4, 6)),
    "layer_norm_of_view": lambda x: F.layer_norm(x.transpose(1, 2), (4,)),
    "layer_norm_of_lazy": lambda x: F.layer_norm(x * 2 + 1, (6,)),
    "layer_norm_half": lambda x: F.layer_norm(x.half(), (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "rms_norm_half": lambda x: F.rms_norm((x / 100).half(), (6,)),
    "rms_norm_weight": lambda x: F.rms_norm(x, (6,), torch.arange(6.0), 1e-2),
    "softmax": lambda x: x.softmax(-1),
    "softmax_first": lambda x: x.softmax(0),
    "softmax_middle": lambda x: F.softmax(x, dim=1),
    "softmax_dtype": lambda x: F.softmax(x.half(), dim=-1, dtype=torch.float32),
    "softmax_half": lambda x: x.half().softmax(-1),
    "softmax_rank_0": lambda x: x.sum().softmax(0),
    "softmax_largest": lambda x: x.softmax(-1).amax(-1),
    "softmax_largest_compared": lambda x: (x.softmax(-1).amax(-1) >= 0.3).logical_not(),
    "softmax_largest_twice": lambda x: (lambda p: (p, p >= 0.3))((2 * x).softmax(-1).amax(-1)),
    "softmax_largest_kept": lambda x: x.softmax(-1).amax(-1, keepdim=True),
    "softmax_largest_and_all": lambda x: (lambda p: (p.amax(-1), p))((3 * x).softmax(-1)),
    "log_softmax": lambda x: x.log_softmax(-1),
    "log_softmax_middle": lambda x: x.log_softmax(1),
    "group_norm": lambda x: F.group_norm(x, 2),
    "group_norm_weight": lambda x: F.group_norm(x, 4, torch.arange(4.0), torch.ones(4), 1e-3),
    "instance_norm": lambda x: F.instance_norm(x),
    "batch_norm": lambda x: F.batch_norm(x, torch.arange(4.0), torch.ones(4) * 2),
    "batch_norm_weight": lambda x: F.batch_norm(
        x, torch.arange(4.0), torch.ones(4) * 2, torch.arange(4.0), torch.ones(4), eps=0.1
    ),
}


def test_normalizations(agree: Check) -> None:
    agree(CASES, [torch.randn(3, 4, 6)])


def test_symbolic_batch(agree: Check) -> None:
    names = (
        "layer_norm_bias",
        "layer_norm_two",
        "rms_norm",
        "softmax_middle",
        "log_softmax",
        "group_norm",
        "batch_norm",
    )
    more = [(torch.randn(n, 4, 6),) for n in (1, 2, 17)]
    agree({name: CASES[name] for name in names}, [torch.randn(3, 4, 6)], [{0: "batch"}], more)


@pytest.mark.parametrize("width", [1, 16, 63, 300])
def test_widths(agree: Check, width: int) -> None:
    cases = {
        "layer_norm": lambda x: F.layer_norm(x, (width,), x[0, 0], x[0, 1]),
        "rms_norm": lambda x: F.rms_norm(x, (width,), eps=1e-6),
        "softmax": lambda x: x.softmax(-1),
        "softmax_largest": lambda x: x.softmax(-1).amax(-1),
        "softmax_largest_compared": lambda x: (x.softmax(-1).amax(-1) >= 0.3).logical_not(),
        "softmax_largest_twice": lambda x: (lambda p: (p, p >= 0.3))((2 * x).softmax(-1).amax(-1)),
        "softmax_largest_kept": lambda x: x.softmax(-1).amax(-1, keepdim=True),
        "softmax_largest_and_all": lambda x: (lambda p: (p.amax(-1), p))((3 * x).softmax(-1)),
        "log_softmax": lambda x: x.log_softmax(-1),
    }
    agree(cases, [torch.randn(2, 3, width) * 5], atol=1e-5)


def test_symbolic_last_axis(agree: Check) -> None:
    cases = {
        "softmax": lambda x: x.softmax(-1),
        "softmax_largest": lambda x: x.softmax(-1).amax(-1),
        "softmax_largest_compared": lambda x: (x.softmax(-1).amax(-1) >= 0.3).logical_not(),
        "softmax_largest_twice": lambda x: (lambda p: (p, p >= 0.3))((2 * x).softmax(-1).amax(-1)),
        "softmax_largest_kept": lambda x: x.softmax(-1).amax(-1, keepdim=True),
        "softmax_largest_and_all": lambda x: (lambda p: (p.amax(-1), p))((3 * x).softmax(-1)),
        "log_softmax": lambda x: x.log_softmax(-1),
        "first": lambda x: x.softmax(0),
    }
    agree(cases, [torch.randn(3, 5)], [{1: "seq"}], [(torch.randn(3, n),) for n in (1, 16, 65, 130)])


def test_large_mean_does_not_cancel(agree: Check) -> None:
    agree({"layer_norm": lambda x: F.layer_norm(x, (50,))}, [torch.randn(2, 50) + 1000], atol=2e-3)


def test_special_values(agree: Check) -> None:
    nan, inf = math.nan, math.inf
    rows = [
        [0.0, nan, 1.0],
        [inf, 1.0, 2.0],
        [-inf, 1.0, 2.0],
        [-inf, -inf, -inf],
        [3e38, -3e38, 0.0],
        [-0.0, 0.0, 0.0],
    ]
    cases = {"softmax": CASES["softmax"], "first": CASES["softmax_first"], "log_softmax": CASES["log_softmax"]}
    agree(cases, [torch.tensor(rows).repeat(1, 7)])


def test_float64(agree: Check) -> None:
    names = ("softmax", "softmax_first", "softmax_rank_0", "log_softmax", "log_softmax_middle", "instance_norm")
    cases = {name: CASES[name] for name in names}
    cases["layer_norm"] = lambda x: F.layer_norm(x, (6,), x[0, 0], x[0, 1], 1e-3)
    cases["rms_norm"] = lambda x: F.rms_norm(x, (4, 6), x[0])
    cases["group_norm"] = lambda x: F.group_norm(x, 2, x[0, :, 0], x[0, :, 1])
    cases["logsumexp"] = lambda x: x.logsumexp(1)
    agree(cases, [torch.randn(3, 4, 6, dtype=torch.float64)])
    agree(cases, [torch.randn(3, 4, 6, dtype=torch.float64)], [{0: "batch"}], [(torch.randn(5, 4, 6).double(),)])
