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


def test_large_integers_must_be_equal_to_the_last_bit() -> None:
    ids = torch.tensor([2**60, 2**60 + 5])
    reason = judge(ids, ids + 1, ids).reason
    assert reason == f"is {2**60 + 1} instead of {2**60}, wrong in 2 of 2 elements"


def test_an_index_that_float64_chooses_otherwise_excuses_no_other() -> None:
    old, reference = torch.tensor([3, 7, 1]), torch.tensor([90, 7, 1])
    assert judge(old, torch.tensor([90, 7, 1]), reference).reason is None
    assert judge(old, torch.tensor([3, 8, 1]), reference).reason == "is 8 instead of 7, wrong in 1 of 3 elements"


def test_a_truth_value_that_float64_decides_otherwise_excuses_no_other() -> None:
    old, reference = torch.tensor([True, True]), torch.tensor([False, True])
    assert judge(old, reference, reference).reason is None
    assert judge(old, torch.tensor([True, False]), reference).reason


def test_integers_that_come_of_large_floats_may_round_otherwise() -> None:
    reference = torch.tensor([123456789, 987654321])
    assert judge(reference + torch.tensor([3, 0]), reference + torch.tensor([5, 60]), reference).reason is None


def test_an_overflow_excuses_nothing_elsewhere() -> None:
    old, reference = torch.tensor([math.inf, 1.0]), torch.tensor([1e60, 1.0], dtype=torch.float64)
    assert judge(old, old.clone(), reference).error == 0
    assert judge(old, torch.tensor([math.nan, 1.0]), reference).reason is None
    assert judge(old, torch.tensor([math.inf, 2.0]), reference).reason
    assert judge(torch.ones(2), torch.tensor([math.inf, 1.0]), ONES[:2]).reason


def test_the_lowest_number_of_a_mask_is_no_scale() -> None:
    lowest = torch.finfo(torch.float32).min
    old = torch.tensor([lowest, 1.0])
    assert judge(old, torch.tensor([lowest, 1.1]), old.double()).reason
    assert judge(old, torch.tensor([1.0, 1.0]), old.double()).reason
    assert judge(old, old + 0, old.double()).error == 0
