"""Times of all kernels of a model, and the roofs beside them, such that other processes change neither for long.

What others take can only make a kernel slower or a roof lower, and comes in stretches. So a kernel's time is the lower
quartile over the rounds, each round giving the median of the kernel's calls in it: up to three rounds in four may be
disturbed. Where a kernel looks slow, or faster than its roof, the roofs are measured again and then all kernels in
further rounds, and everything is judged anew, from all rounds and the highest roofs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.runtime.manifest import GENERIC, SLOW
from graphopt.tools.profiling.shares import Profile, make_profile

if TYPE_CHECKING:
    from graphopt.runtime.profiling import Round
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.profiling.roofs import RoofMeter

MOST = 5  # measurements of a model


@dataclass
class _Rounds:
    """All that was measured: `runs` are the seconds of whole runs without taking times inside."""

    runs: list[float] = field(default_factory=list)
    kernels: list[Round] = field(default_factory=list)


def measure(
    session: InferenceSession, feed: Mapping[str, Any], entry: str, rounds: int, meter: RoofMeter | None
) -> tuple[Profile, Mapping[str, int]]:
    """The profile of an entry, from `rounds` rounds or up to MOST times as many, and the sizes of the feed.

    Leaves the session's state as it was when it was opened.
    """
    taken = _Rounds()
    for _ in range(MOST):
        roofs = meter.measure() if meter else None
        sizes = _take(session, feed, entry, rounds, taken)
        times, whole = lower_quartiles(taken.kernels), lower_quartile(taken.runs)
        profile = make_profile(times, session.variant.kernels, entry, sizes, whole, roofs)
        if not doubtful(profile):
            break
    return profile, sizes


def _take(
    session: InferenceSession, feed: Mapping[str, Any], entry: str, rounds: int, taken: _Rounds
) -> Mapping[str, int]:
    """The rounds of one measurement, added to those `taken`; returns the sizes of the feed."""
    session.run(None, feed, entry)  # the first warms up
    for _ in range(rounds):
        session.run(None, feed, entry)
        assert session.last_run is not None
        taken.runs.append(session.last_run.seconds)
    sizes = dict(session.last_run.sizes) if session.last_run else {}
    session.reset()
    taken.kernels += session.profile_rounds(feed, entry, rounds)
    return sizes


def doubtful(profile: Profile) -> bool:
    """Whether disturbance may have made a kernel look slow, or a roof low; some kernels are slow at any speed."""
    return any(
        (row.slow and row.rule != GENERIC and SLOW not in row.configuration)
        or (row.share_of_roof is not None and row.share_of_roof > 1)
        for row in profile.rows
    )


def lower_quartiles(rounds: Sequence[Round]) -> dict[str, tuple[float, float]]:
    """kernel -> (calls a run, seconds a call: the lower quartile over the rounds that call it)."""
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for spans in rounds:
        for name, times in spans.items():
            calls[name] = calls.get(name, 0) + len(times)
            seconds.setdefault(name, []).append(statistics.median(times))
    return {name: (calls[name] / len(rounds), lower_quartile(seconds[name])) for name in calls}


def lower_quartile(values: Sequence[float]) -> float:
    """The least of them that a quarter does not exceed."""
    return sorted(values)[(len(values) - 1) // 4]
