"""What the exits come to: notes for people, and the curve of quality against cost for a chart."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.contract import TradeOff
from graphopt.passes.early_exit.thresholds import Outcomes, Point, curve, judge, separation

POINTS = 12  # of the curve, besides its ends


def account(places: Sequence[str], judged: Outcomes, costs: Sequence[float], chosen: Point) -> tuple[str, ...]:
    """One note an exit, one on the end and one on all, of the held-out data."""
    found = judge(judged, costs, chosen.thresholds)
    notes = []
    for number, name in enumerate(places):
        right = judged.quality[:, number] >= judged.right
        auroc = separation(judged.confidence[:, number], right)
        told = "all answers are alike" if auroc is None else f"AUROC {auroc:.3f} of its being right"
        notes.append(
            f"exit {number} behind {name}: threshold {chosen.thresholds[number]:.4g}, {found.shares[number]:.1%} of "
            f"held-out samples, {costs[number]:.1%} of the network's multiply-accumulates, right on "
            f"{float(right.double().mean()):.1%} of all, {told}"
        )
    whole = float(judged.quality[:, -1].mean())
    notes.append(f"to the end: {found.shares[-1]:.1%} of held-out samples, at {costs[-1]:.1%}")
    kind = "right" if judged.right == 1 else "alike"
    notes.append(
        f"on held-out data {found.quality:.2%} {kind} at {found.cost:.1%} of the multiply-accumulates, the "
        f"whole network {whole:.2%}; where thresholds were chosen {chosen.quality:.2%} at {chosen.cost:.1%}"
    )
    return tuple(notes)


def latency(
    judged: Outcomes, costs: Sequence[float], chosen: Point, seconds: tuple[float | None, float | None]
) -> tuple[str, ...]:
    """What a held-out sample is expected to take, at the measured rate of the whole network, if it was measured."""
    whole, early = seconds
    if whole is None or early is None:
        return ()
    found = judge(judged, costs, chosen.thresholds)
    *left, end = (f"{1e3 * whole * cost:.4g} ms" for cost in costs)
    each = ", ".join(f"{time} at exit {number}" for number, time in enumerate(left))
    return (
        f"expected latency on held-out data: {1e3 * whole * found.cost:.4g} ms a run ({each}, {end} to the end); "
        f"measured on the examples: {1e3 * early:.4g} ms, without exits {1e3 * whole:.4g} ms",
    )


def trade_offs(
    judged: Outcomes, costs: Sequence[float], chosen: Point, policy: str, seconds: tuple[float | None, float | None]
) -> tuple[TradeOff, ...]:
    """Quality by mean cost on held-out data: the whole network and what was chosen, then one threshold for all exits.

    `seconds` are those of one run of the first two at the sizes of the examples, where they were measured.
    """
    found = judge(judged, costs, chosen.thresholds)
    taken = [(1.0, float(judged.quality[:, -1].mean()), seconds[0]), (found.cost, found.quality, seconds[1])]
    return (
        *(TradeOff("mean cost", cost, "taken", quality, time) for cost, quality, time in taken),
        *(TradeOff("mean cost", item.cost, policy, item.quality, None) for item in curve(judged, costs, POINTS)),
    )
