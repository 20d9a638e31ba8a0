"""Bisection names the wrong rewrite in few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from graphopt.checking.bisection import find_wrong

IDS = [str(number) for number in range(100)]


@pytest.mark.parametrize("wrong", ["0", "1", "57", "98", "99"])
def test_the_wrong_one_is_named_within_the_bound(wrong: str) -> None:
    runs: list[int] = []

    def fails(ids: Sequence[str]) -> bool:
        runs.append(len(ids))
        return wrong in ids

    assert find_wrong(IDS, fails) == wrong
    assert len(runs) <= math.log2(len(IDS)) + 2


def test_of_two_that_are_wrong_together_it_is_the_later() -> None:
    assert find_wrong(IDS, lambda ids: "3" in ids and "70" in ids) == "70"


def test_one_of_one() -> None:
    assert find_wrong(["a"], lambda ids: "a" in ids) == "a"


def test_a_failure_without_any_is_nobodys() -> None:
    assert find_wrong(IDS, lambda ids: True) is None
