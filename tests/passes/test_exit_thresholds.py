"""Thresholds that are chosen: exact on small tables, monotone in cost, AUROC as it is defined."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes.early_exit.gate import probabilities
from graphopt.passes.early_exit.thresholds import (
    CAUTION,
    Outcomes,
    area,
    curve,
    exits_taken,
    for_cost,
    for_quality,
    for_shares,
    judge,
    separation,
)

COSTS = (0.25, 0.5, 1.0)


@pytest.fixture
def outcomes() -> Outcomes:
    """Surer answers are right more often, and more so at later exits."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, 2, generator=generator)
    luck = torch.rand(200, 3, generator=generator)
    chance = torch.cat([0.3 + 0.6 * confidence[:, :1], 0.5 + 0.5 * confidence[:, 1:], torch.ones(200, 1)], 1)
    return Outcomes(confidence, (luck < chance).double())


def test_the_first_exit_that_is_sure_is_taken() -> None:
    confidence = torch.tensor([[0.9, 0.1], [0.4, 0.8], [0.4, 0.4], [0.5, 0.9], [torch.nan, 0.7]])
    assert exits_taken(confidence, [0.5, 0.6]).tolist() == [0, 1, 2, 0, 1]
    assert exits_taken(confidence[:4], [0.0, 0.0]).tolist() == [0] * 4
    assert exits_taken(confidence, [1.1, 1.1]).tolist() == [2] * 5


def test_cost_is_the_shares_of_samples_times_what_they_cost(outcomes: Outcomes) -> None:
    point = judge(outcomes, COSTS, [0.6, 0.7])
    counts = exits_taken(outcomes.confidence, [0.6, 0.7]).bincount(minlength=3)
    assert point.shares == tuple((counts.double() / 200).tolist())
    assert point.cost == pytest.approx(sum(s * c for s, c in zip(point.shares, COSTS, strict=True)), abs=1e-12)


def test_cost_falls_along_the_curve(outcomes: Outcomes) -> None:
    points = curve(outcomes, COSTS)
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True) and costs[0] == 1.0 and costs[-1] == 0.25
    assert points[0].quality == pytest.approx(float(outcomes.quality[:, -1].mean())) and points[
        0
    ].error == pytest.approx(0.5**0.5 / 200)
    assert 0 < area(points) < 1
    assert area(curve(outcomes, (0.5, 0.75, 1.0))) < area(points)


def test_targets_are_met(outcomes: Outcomes) -> None:
    good = for_quality(outcomes, COSTS, 0.9)
    assert good.quality - CAUTION * good.error >= 0.9 and good.cost < 1
    assert for_quality(outcomes, COSTS, 0.9).cost <= for_quality(outcomes, COSTS, 0.95).cost
    cheap = for_cost(outcomes, COSTS, 0.6)
    assert cheap.cost <= 0.6 and cheap.quality >= for_cost(outcomes, COSTS, 0.4).quality
    assert for_quality(outcomes, COSTS, 1.01).quality == max(point.quality for point in curve(outcomes, COSTS))
    assert for_cost(outcomes, COSTS, 0.1).cost == 0.25


@pytest.mark.parametrize("shares", [(0.25, 0.5), (0.0, 0.5), (1.0, 0.0), (0.1, 0.9)])
def test_shares_are_taken_by_the_most_confident(outcomes: Outcomes, shares: tuple[float, float]) -> None:
    point = for_shares(outcomes, COSTS, shares)
    assert point.shares[:2] == pytest.approx(shares, abs=1e-9)
    taken = exits_taken(outcomes.confidence, point.thresholds)
    first = outcomes.confidence[:, 0]
    if 0 < shares[0] < 1:
        assert first[taken == 0].min() > first[taken != 0].max()


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1])
    right = torch.tensor([True, True, False, False, True])
    pairs = [
        (a, b)
        for a, r in zip(confidence, right, strict=True)
        if r
        for b, w in zip(confidence, right, strict=True)
        if not w
    ]
    share = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert separation(confidence, right) == pytest.approx(share)
    assert separation(confidence, torch.ones(5, dtype=torch.bool)) is None


def test_probabilities_of_exits_are_what_gates_leave() -> None:
    gates = torch.tensor([[0.3, 0.5], [0.8, 0.5], [1.0, 0.2]])
    assert torch.allclose(probabilities(gates), torch.tensor([[0.3, 0.5, 0.2], [0.8, 0.2, 0.0], [1.0, 0.0, 0.0]]))
