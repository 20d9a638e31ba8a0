"""Repetitions in a sequence: the longest stretches that are one word written two or more times in a row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST_WORD = 1024  # letters: keeps the search linear in the sequence


@dataclass(frozen=True)
class Run:
    """`count` words of `period` letters from `start` on."""

    start: int
    period: int
    count: int

    def words(self) -> list[range]:
        """The positions of each word."""
        return [range(start, start + self.period) for start in range(self.start, self.end, self.period)]

    @property
    def end(self) -> int:
        return self.start + self.period * self.count


def find_runs(letters: Sequence[int], weights: Sequence[int]) -> list[Run]:
    """Runs that do not overlap, in order; what covers more weight goes first, then what has the shorter word.

    A stretch that holds part of one more word is cut at its front: in `d abcd abcd` the words are `abcd`, as in a
    network where an embedding ends in the same layer norm as every block. Words of a run are not searched for runs.
    """
    total = np.concatenate([[0], np.cumsum(np.asarray(weights, dtype=np.int64))])
    free = np.ones(len(letters), dtype=bool)
    heap: list[tuple[int, int, int, int]] = []

    def offer(start: int, end: int, period: int) -> None:
        if (count := (end - start) // period) >= 2:
            covered = int(total[end] - total[end - count * period])
            heapq.heappush(heap, (-covered, period, start, end))

    for start, end, period in _stretches(np.asarray(letters, dtype=np.int64)):
        offer(start, end, period)
    chosen = []
    while heap:
        _, period, start, end = heapq.heappop(heap)
        if free[start:end].all():
            count = (end - start) // period
            chosen.append(Run(end - count * period, period, count))
            free[end - count * period : end] = False
        else:
            for piece in _true_stretches(free[start:end]):
                offer(start + piece[0], start + piece[1], period)
    return sorted(chosen, key=lambda run: run.start)


def _stretches(letters: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, end, period) of every maximal repetition; each with its shortest period only."""
    seen: set[tuple[int, int]] = set()
    found = []
    for period in range(1, min(len(letters) // 2, LONGEST_WORD) + 1):
        for start, last in _true_stretches(letters[:-period] == letters[period:], period):
            if (start, last + period) not in seen:
                seen.add((start, last + period))
                found.append((start, last + period, period))
    return found


def _true_stretches(flags: np.ndarray, least: int = 1) -> list[tuple[int, int]]:
    """(start, end) of the stretches of at least `least` that are all true."""
    starts, ends = np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2).T
    long = ends - starts >= least
    return list(zip(starts[long].tolist(), ends[long].tolist(), strict=True))
