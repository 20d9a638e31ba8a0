"""Sums, extremes, means, norms, positions and running sums over every kind of axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Check = Callable[..., None]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x.sum(),
    "sum_last": lambda x: x.sum(-1),
    "sum_kept": lambda x: x.sum(-1, keepdim=True),
    "sum_first": lambda x: x.sum(0),
    "sum_middle": lambda x: x.sum(1, keepdim=True),
    "sum_two": lambda x: x.sum((0, -1)),
    "sum_last_two": lambda x: x.sum((1, 2)),
    "sum_none": lambda x: x.sum(()),
    "sum_dtype": lambda x: x.sum(-1, dtype=torch.float64),
    "sum_of_lazy": lambda x: (x * 2 + 1).sum(1),
    "mean": lambda x: x.double().mean(),
    "mean_axes": lambda x: x.float().mean((0, 1), keepdim=True),
    "mean_dtype": lambda x: x.mean(1, dtype=torch.float32),
    "amax": lambda x: x.amax(-1),
    "amax_first": lambda x: x.amax(0, keepdim=True),
    "amax_all": lambda x: x.amax(),
    "amin": lambda x: x.amin((0, 2)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max_axis": lambda x: x.max(1),
    "max_axis_kept": lambda x: x.max(-1, keepdim=True),
    "min_axis": lambda x: x.min(0),
    "argmax": lambda x: x.argmax(),
    "argmax_axis": lambda x: x.argmax(-1),
    "argmax_kept": lambda x: x.argmax(1, keepdim=True),
    "argmin_axis": lambda x: x.argmin(0),
    "prod": lambda x: (x.float() * 0.3).prod(-1),
    "prod_integer": lambda x: x.prod(0, keepdim=True),
    "prod_all": lambda x: (x.float() * 0.2).prod(),
    "any": lambda x: (x > 2).any(),
    "any_axis": lambda x: (x > 2).any(-1),
    "any_number": lambda x: x.any(1, keepdim=True),
    "all": lambda x: (x > -9).all(),
    "all_axis": lambda x: (x > 0).all(0),
    "norm": lambda x: x.float().norm(dim=-1),
    "norm_1": lambda x: x.float().norm(p=1, dim=1),
    "norm_inf": lambda x: x.float().norm(p=math.inf, dim=0),
    "norm_all": lambda x: torch.linalg.vector_norm(x.float()),
    "normalize": lambda x: torch.nn.functional.normalize(x.float(), dim=1),
    "var": lambda x: x.float().var(-1),
    "var_biased": lambda x: x.float().var((0, 1), unbiased=False, keepdim=True),
    "var_all": lambda x: x.float().var(),
    "std": lambda x: x.double().std(1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x.float(), 1),
    "logsumexp": lambda x: x.float().logsumexp(-1),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum_last": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(1),
    "cumprod_last": lambda x: x.cumprod(-1),
    "count_nonzero": lambda x: (x != 0).sum(-1),
    "mask_sum": lambda x: (x > 0).sum(),
}


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(-5, 6, shape).to(dtype)


def applicable(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    found = {}
    for name, case in CASES.items():
        try:
            case(x)
        except RuntimeError:
            continue
        found[name] = case
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_axes(agree: Check, dtype: torch.dtype) -> None:
    x = values(dtype, 3, 5, 19)
    agree(applicable(x), [x])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float16, torch.bfloat16])
def test_dtypes(agree: Check, dtype: torch.dtype) -> None:
    x = values(dtype, 2, 3, 18)
    names = ("sum_last", "sum_first", "amax", "amin", "max_axis", "argmax", "any_number", "cumsum", "mean_dtype")
    agree({name: case for name, case in applicable(x).items() if name in names}, [x])


def test_symbolic_sizes(agree: Check) -> None:
    names = [n for n in CASES if not n.startswith(("sum_none", "prod", "var", "std"))]
    more = [(torch.randn(n, m, 6),) for n, m in [(1, 1), (2, 17), (5, 64)]]
    agree({name: CASES[name] for name in names}, [torch.randn(3, 4, 6)], [{0: "batch", 1: "seq"}], more)


def test_symbolic_last_axis(agree: Check) -> None:
    names = ("sum_last", "sum_two", "amax", "argmax_axis", "norm", "logsumexp", "cumsum_last", "mean")
    more = [(torch.randn(2, 3, n),) for n in (1, 16, 65, 100)]
    agree({name: CASES[name] for name in names}, [torch.randn(2, 3, 7)], [{2: "seq"}], more)


def test_long_rows(agree: Check) -> None:
    agree({n: CASES[n] for n in ("sum_last", "amax", "argmax_axis", "var", "sum")}, [torch.randn(2, 1, 1031)])


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_small_ranks(agree: Check, shape: tuple[int, ...]) -> None:
    cases = {
        "sum": lambda x: x.sum(),
        "last": lambda x: x.sum(-1),
        "max": lambda x: x.max(),
        "mean": lambda x: x.mean(),
    }
    agree(cases, [torch.randn(shape)])


def test_nan_and_infinities(agree: Check) -> None:
    nan, inf = math.nan, math.inf
    rows = [[1.0, nan, 2.0], [inf, -inf, 0.0], [-inf, -inf, -inf], [inf, 1.0, inf], [nan, nan, nan], [-0.0, 0.0, -1.0]]
    names = ("sum_last", "sum_first", "amax", "amin", "max", "min", "max_axis", "min_axis", "argmax_axis", "norm")
    agree({name: CASES[name] for name in names}, [torch.tensor(rows).unsqueeze(0).repeat(2, 1, 9)])
