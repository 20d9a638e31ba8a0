"""What channel gating costs a network on digits that was trained: bounds that hold for three seeds with room."""

from __future__ import annotations

import re
from functools import cache

import pytest

import graphopt
from graphopt.passes.channel_gating import estimate
from graphopt.report import PassReport
from graphopt.tools.benchmarking import digits_cnn
from graphopt.tools.benchmarking.small_transformers import Case

SEEDS = (0, 1, 2)
WIDTHS, SIDE, STEPS = (64, 128, 128), 8, 80
FIT_STEPS = 120


@cache
def digits(seed: int) -> Case:
    return digits_cnn.case(seed, STEPS, WIDTHS, SIDE)


def gated(seed: int, options: str) -> tuple[float, float, PassReport]:
    """Per cent of the held-out digits that are right before and after, and the account."""
    case = digits(seed)
    spec = f"channel-gating{{{options}}}"
    result = graphopt.optimize(case.program, spec, data=case.data, metric=case.metric, seed=seed, verify="structure")
    assert result.report.metric is not None
    (report,) = result.report.passes
    return 100 * result.report.metric.before, 100 * result.report.metric.after, report


def percent(report: PassReport, pattern: str) -> float:
    """The number in the note that begins so."""
    (found,) = [match for note in report.notes if (match := re.match(pattern + r"[^0-9]*([0-9.]+)%", note))]
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_predictors_follow_their_targets_without_training(seed: int) -> None:
    before, after, report = gated(seed, "mass=0.8,form=mask")
    assert before > 96 and after >= before - 2.5
    assert percent(report, "predictors agree") >= 90
    told = 100 * estimate(digits(seed).program, digits(seed).data, mass=0.8).total
    assert told == pytest.approx(percent(report, "estimated before training"), abs=0.1)
    assert abs(told - percent(report, "measured on the data")) <= 10


@pytest.mark.slow
@pytest.mark.parametrize(("options", "loss", "work"), [("mass=0.7", 3, 70), ("keep=0.75", 1.5, 57)])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_learns_with_its_gates_is_right_with_less_work(seed: int, options: str, loss: float, work: float) -> None:
    before, after, report = gated(seed, f"{options},form=mask,fit-steps={FIT_STEPS}")
    _, untrained, _ = gated(seed, f"{options},form=mask")
    assert after >= before - loss and after > untrained
    assert percent(report, "measured on the data") <= work
    assert percent(report, "predictors agree") >= 70
