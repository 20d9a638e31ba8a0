"""The bound that exact rewrites keep: four times the error there was, plus a millionth."""

from __future__ import annotations

import math

import torch

from graphopt.checking.exactness import judge

ONES = torch.ones(4, dtype=torch.float64)


def test_four_times_the_error_there_was_is_exact() -> None:
    before = torch.full((4,), 1.001)
    assert judge(before, torch.full((4,), 1.0039), ONES).reason is None
    assert (
        judge(before, torch.full((4,), 1.0041), ONES).reason
        == "is off by 0.0041, where at most 0.004 is exact (0.001 before)"
    )


def test_a_millionth_of_the_largest_value_is_exact() -> None:
    assert judge(100 * ONES, 100 * ONES + 0.9e-4, 100 * ONES).reason is None
    assert judge(100 * ONES, 100 * ONES + 1.1e-4, 100 * ONES).reason


def test_nan_that_was_not_there_is_wrong_and_nan_that_was_is_not() -> None:
    reference = torch.ones(2, dtype=torch.float64)
    nan = torch.tensor([1.0, math.nan])
    assert "off by inf" in str(judge(torch.ones(2), nan, reference).reason)
    assert judge(nan, nan.clone(), reference).reason is None


def test_another_type_or_shape_is_wrong() -> None:
    wide, flat = torch.ones(4, dtype=torch.float64), torch.ones(1, 4)
    assert judge(torch.ones(4), wide, ONES).reason == "is torch.float64[4] instead of torch.float32[4]"
    assert "instead of" in str(judge(torch.ones(4), flat, ONES).reason)


def test_integers_must_be_equal() -> None:
    ids = torch.tensor([1, 2])
    assert judge(ids, ids.clone(), ids).error == 0
    assert judge(ids, ids + 1, ids).reason
