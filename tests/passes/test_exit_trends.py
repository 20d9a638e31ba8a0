"""What early exits cost small networks that were trained: bounds that hold for three seeds with room to spare."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

import graphopt
from graphopt.program import Program
from graphopt.tools.benchmarking import digits_vit
from graphopt.tools.benchmarking.small_transformers import Case

SEEDS = (0, 1, 2)


@cache
def digits(seed: int) -> Case:
    return digits_vit.case(seed)


@cache
def judged(seed: int, passes: str) -> tuple[Program, float, float, float]:
    """The program, per cent of held-out digits right before and after, and the mean cost on them, of the whole's."""
    case = digits(seed)
    result = graphopt.optimize(case.program, passes, data=case.data, metric=case.metric, seed=seed, verify="structure")
    metric, program = result.report.metric, result.program
    assert metric is not None and program.exits is not None
    held_out = [feed["images"] for feed, _ in case.data[-digits_vit.PARTS[-1][1] :]]
    exits = torch.cat([program(images)[program.exits.answers] for images in held_out])
    macs = torch.tensor(program.exits.macs, dtype=torch.float64)
    return program, 100 * metric.before, 100 * metric.after, float(macs[exits].mean() / macs[-1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_sure_answers_are_early_and_right(seed: int) -> None:
    _, before, after, cost = judged(seed, "early-exit{exits=[0,1,2,3,4],threshold=0.95}")
    assert after >= before - 1.5 and cost <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_higher_thresholds_cost_more_and_lose_little(seed: int) -> None:
    points = [judged(seed, f"early-exit{{exits=[0,1,2,3,4],threshold={limit}}}")[2:] for limit in (0.8, 0.95)]
    costs = [cost for _, cost in points]
    assert costs == sorted(costs)
    assert all(after >= before - 1 for (before, _), (after, _) in pairwise(points))


@pytest.mark.slow
def test_half_a_point_is_kept_on_average() -> None:
    found = [judged(seed, "early-exit") for seed in SEEDS]
    assert sum(before - after for _, before, after, _ in found) / len(found) <= 1.0
    assert sum(cost for *_, cost in found) / len(found) <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_gates_are_as_good_as_thresholds(seed: int) -> None:
    _, before, after, cost = judged(seed, "early-exit{policy=gate,target-cost=0.45}")
    assert after >= before - 2 and cost <= 0.55
