"""Things that are timed one after the other, again and again, so that what disturbs one disturbs all."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def in_turns(runs: Sequence[Callable[[], float]], turns: int) -> list[list[float]]:
    """What every turn of each gives; who begins changes, so that none always finds the caches warm."""
    found: list[list[float]] = [[] for _ in runs]
    sides = list(range(len(runs)))
    for turn in range(turns):
        first = -turn % max(1, len(runs))
        for side in (*sides[first:], *sides[:first]):
            found[side].append(runs[side]())
    return found
