"""Sorting: long and short rows, ties, NaN, rows of unknown length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Check = Callable[..., Any]

CASES: dict[str, Callable[..., Any]] = {
    "sort": lambda x: x.sort(dim=-1, stable=True),
    "sort_descending": lambda x: x.sort(dim=-1, descending=True, stable=True),
    "sort_first": lambda x: x.sort(dim=0, stable=True),
    "argsort": lambda x: x.argsort(dim=-1, stable=True),
    "values_of_few": lambda x: x.topk(3).values,
    "values_of_least": lambda x: x.topk(2, largest=False).values,
}


def test_rows_of_unknown_length(agree: Check) -> None:
    more = [(torch.randn(2, length),) for length in (3, 4, 5, 64, 65, 1000)]
    agree(CASES, [torch.randn(2, 17)], [{1: "length"}], more)


def test_ties_and_no_numbers(agree: Check) -> None:
    x = torch.randint(0, 4, (3, 50)).float()
    x[0, 7] = x[1, 3] = x[1, 9] = math.nan
    x[2, 5], x[2, 6] = math.inf, -math.inf
    agree(CASES, [x])
    agree({**CASES, "many": lambda x: x.topk(70).values}, [torch.randint(-5, 5, (2, 90))])


def test_the_first_of_a_sort_are_chosen_in_order_of_appearance(agree: Check) -> None:
    x = torch.randint(0, 4, (3, 50)).float()
    chosen = {
        "best": lambda x: x.sort(dim=-1, descending=True, stable=True).values[:, :3],
        "places_of_best": lambda x: x.sort(dim=-1, descending=True, stable=True).indices[:, :3],
        "places_of_least": lambda x: x.sort(dim=0, stable=True).indices[:2],
    }
    (variant,) = agree(chosen, [x]).artifact.manifest.variants
    forms = [kernel.configuration["form"] for kernel in variant.kernels.values() if kernel.rule == "sort"]
    assert set(forms) == {"insertion"}
    rest = {"rest": lambda x: x.sort(dim=-1, stable=True).values[:, 3:], **chosen}
    agree(rest, [torch.randint(-5, 5, (2, 17))], [{1: "length"}], [(torch.randint(-5, 5, (2, 40)),)])
