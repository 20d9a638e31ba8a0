"""Which thresholds: for an accuracy, for a mean cost, or for given shares of the samples at each exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 1000  # thresholds that are tried
CAUTION = 1.0  # standard errors by which a target has to be passed: few samples say little


@dataclass(frozen=True)
class Outcomes:
    """What exits make of samples: `confidence` [samples, exits], and `quality` [samples, exits + 1] of each answer.

    Quality is 1 or 0 for a right or wrong class, or a cosine; its last column is that of the end. An answer counts as
    right from the quality `right` on.
    """

    confidence: Tensor
    quality: Tensor
    right: float = 1.0


@dataclass(frozen=True)
class Point:
    """What thresholds come to: `quality` and `cost` are means over samples, cost a share of the whole network's.

    `error` is the standard error of how far `quality` is from that of the end, as if half a sample more had differed
    by 1 (Jeffreys' prior): that none of a few hundred did says less than that none will.
    """

    thresholds: tuple[float, ...]
    quality: float
    error: float
    cost: float
    shares: tuple[float, ...]


def exits_taken(confidence: Tensor, thresholds: Sequence[float]) -> Tensor:
    """[samples], int64: the first exit whose confidence is at least its threshold, else the number of exits."""
    limits = torch.tensor(list(thresholds), dtype=confidence.dtype)
    taken = torch.cat([confidence >= limits, torch.ones(len(confidence), 1, dtype=torch.bool)], 1)
    return taken.int().argmax(1)


def judge(outcomes: Outcomes, costs: Sequence[float], thresholds: Sequence[float]) -> Point:
    """What these thresholds come to; `costs` [exits + 1] are shares of the whole network's."""
    taken = exits_taken(outcomes.confidence, thresholds)
    quality = outcomes.quality.double().gather(1, taken[:, None])[:, 0]
    lost = outcomes.quality[:, -1].double() - quality
    error = (float(lost.var(correction=0)) * len(taken) + 0.5) ** 0.5 / len(taken)
    counts = torch.bincount(taken, minlength=len(costs)).double() / len(taken)
    cost = float(counts @ torch.tensor(costs, dtype=torch.float64))
    return Point(tuple(thresholds), float(quality.mean()), error, cost, tuple(counts.tolist()))


def curve(outcomes: Outcomes, costs: Sequence[float], most: int = MOST) -> list[Point]:
    """One threshold for all exits, from the one that nothing passes to the one that all do; cost falls."""
    exits = outcomes.confidence.shape[1]
    seen = outcomes.confidence.flatten().nan_to_num(0.0).double().unique()
    between = (seen[1:] + seen[:-1]) / 2
    if len(between) > most:
        between = between[torch.linspace(0, len(between) - 1, most).long()]
    return [judge(outcomes, costs, [limit] * exits) for limit in (2.0, *between.flip(0).tolist(), 0.0)]


def area(points: Sequence[Point]) -> float:
    """The best quality to be had at each mean cost, averaged over costs from nothing to the whole network's."""
    total = best = reached = 0.0
    for point in sorted(points, key=lambda point: point.cost):
        at = min(point.cost, 1.0)
        total += best * (at - reached)
        best, reached = max(best, point.quality), at
    return total + best * (1 - reached)


def for_quality(outcomes: Outcomes, costs: Sequence[float], target: float) -> Point:
    """The cheapest of the curve whose quality is surely at least `target`; the best of all where none is."""
    points = curve(outcomes, costs)
    good = [point for point in points if point.quality - CAUTION * point.error >= target]
    return min(good, key=lambda point: point.cost) if good else max(points, key=lambda point: point.quality)


def for_cost(outcomes: Outcomes, costs: Sequence[float], target: float) -> Point:
    """The best of the curve that costs at most `target`; the cheapest where none does."""
    points = curve(outcomes, costs)
    cheap = [point for point in points if point.cost <= target]
    return max(cheap, key=lambda point: point.quality) if cheap else min(points, key=lambda point: point.cost)


def for_shares(outcomes: Outcomes, costs: Sequence[float], shares: Sequence[float]) -> Point:
    """At each exit the most confident of the samples that are left, as many as its share of all (MSDNet's rule).

    Huang et al. 2018, "Multi-Scale Dense Networks", arXiv 1703.09844.
    """
    left = torch.ones(len(outcomes.confidence), dtype=torch.bool)
    limits = []
    for number, share in enumerate(shares):
        ranked = outcomes.confidence[left, number].double().sort(descending=True).values
        count = min(len(ranked), round(share * len(left)))
        if count == 0:
            limits.append(2.0)
        elif count == len(ranked):
            limits.append(0.0)
        else:
            limits.append(float(ranked[count - 1] + ranked[count]) / 2)
        left &= ~(outcomes.confidence[:, number] >= limits[-1])
    return judge(outcomes, costs, limits)


def separation(confidence: Tensor, right: Tensor) -> float | None:
    """AUROC of "this answer is right" by confidence, ties counting half; None where all are right or all wrong."""
    good, bad = confidence[right].double(), confidence[~right].double()
    if not len(good) or not len(bad):
        return None
    ranks = torch.cat([good, bad])
    _, place, counts = ranks.unique(return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    mean = upper - (counts.double() - 1) / 2
    total = float(mean[place[: len(good)]].sum())
    return (total - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad))
