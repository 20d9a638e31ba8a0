"""Tensors made from numbers and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., None]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda x: torch.zeros(2, 3) + x.sum(),
    "ones": lambda x: torch.ones(3, dtype=torch.int64),
    "full": lambda x: torch.full((2, 2), 1.5),
    "full_bool": lambda x: torch.full((2,), True),
    "full_like": lambda x: torch.full_like(x, -2),
    "full_size": lambda x: torch.full((2, 2), x.shape[0]),
    "zeros_like": lambda x: torch.zeros_like(x),
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.int32),
    "new_zeros": lambda x: x.new_zeros(x.shape[0], 2),
    "new_ones": lambda x: x.new_ones(2),
    "new_full": lambda x: x.new_full((x.shape[0],), 7.0),
    "scalar_tensor": lambda x: torch.tensor(2.5) * x,
    "arange": lambda x: torch.arange(x.shape[0]),
    "arange_start": lambda x: torch.arange(2, 9),
    "arange_step": lambda x: torch.arange(1, 20, 3),
    "arange_down": lambda x: torch.arange(9, -2, -2),
    "arange_float": lambda x: torch.arange(0.0, 1.0, 0.1),
    "arange_dtype": lambda x: torch.arange(5, dtype=torch.float32),
    "arange_end": lambda x: torch.arange(x.shape[0], 2 * x.shape[0]),
    "mask": lambda x: torch.arange(x.shape[0])[None, :] <= torch.arange(x.shape[0])[:, None],
    "linspace": lambda x: torch.linspace(0, 1, 5),
    "scaled_by_size": lambda x: x * x.shape[0] / 2,
    "masked_by_zero": lambda x: torch.zeros_like(x).masked_fill(x > 0, float("-inf")),
    "where_zero": lambda x: torch.where(x > 0, torch.tensor(0.0), torch.tensor(-1e9)),
}


def test_made_tensors(agree: Check) -> None:
    agree(CASES, [torch.randn(4, 3)], [{0: "batch"}], [(torch.randn(n, 3),) for n in (1, 2, 17)])


def test_an_output_that_is_a_constant_of_rank_0(compiled: Callable[..., Any]) -> None:
    scale = torch.tensor(2.5)
    run = compiled({"number": lambda x: scale.clone(), "sum": lambda x: x + scale}, [torch.ones(2)])
    number, total = run(torch.ones(2))
    assert number.shape == () and float(number) == 2.5 and total.tolist() == [3.5, 3.5]


def test_empty_inputs(agree: Check) -> None:
    cases: dict[str, Callable[[torch.Tensor], Any]] = {
        "sum": lambda x: x.sum(1),
        "mean": lambda x: x.mean(1),
        "var": lambda x: x.var(1),
        "var_of_one": lambda x: x.sum(1, keepdim=True).var(1),
        "sin": lambda x: torch.sin(x) + 1,
        "cat": lambda x: torch.cat([x, x], 1),
        "cat_more": lambda x: torch.cat([x, torch.ones(2, 3, 4), x[:, :0]], 1),
        "repeat": lambda x: x.repeat(1, 2, 2).roll(1, 1),
        "linear": lambda x: torch.relu(x @ torch.ones(4, 3)),
        "whole": lambda x: torch.nn.functional.pad(x.long(), (0, 0, 1, 1)),
    }
    agree(cases, [torch.ones(2, 0, 4)])
