"""Finding the best configuration of one workload: successive halving, seeded by the rule's own cost model.

Candidates are built and measured in batches beside the default, the best expected first; what was measured changes what
is expected of those that share settings. The better part of all is measured again for longer, then the best few, then
the best one alone with the default, with fresh noise: only what is faster there by more than the spread is taken.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from graphopt.backends.choice import settings_of
from graphopt.backends.tuner.bench import Bench, Workpiece, geometric_mean
from graphopt.backends.tuner.measuring import DeviceLostError, Entrant, MeasureError, Times

BATCH = 8  # candidates that are built and measured together
MOST_LOSSES = 2  # devices that may be lost while a candidate is on them
_SPARED = 16  # candidates left as the cost model orders them; the others are shuffled among themselves
_MARGIN = 0.985  # of the default's time: less of a gain is not worth another kernel


@dataclass(frozen=True)
class Rung:
    """How long entrants are measured, and how many of the best stay for the next rung."""

    turns: int
    seconds: float
    kept: int


FIRST = Rung(3, 0.003, 8)
LATER = (Rung(7, 0.005, 3), Rung(11, 0.008, 1))
LAST = Rung(21, 0.008, 1)


@dataclass(frozen=True)
class Found:
    """What became of one workload.

    `configuration` is the default where nothing is surely faster; `seconds` and `default_seconds` are of one call, at
    several sizes the geometric mean. `tried` are places in the space, `failures` say what was dropped and why.
    """

    configuration: Any
    seconds: float
    default_seconds: float
    tried: frozenset[int]
    space: int
    failures: tuple[str, ...] = ()

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to try."""
        return len(self.tried) >= self.space


@dataclass
class Carried:
    """What a search leaves to the next one of the same workload, when its device is lost: places in the space.

    `contenders` were the best there, the best first; they are tried again, as what they took does not count on another
    device. `losses` are how often a device was lost with this candidate on it.
    """

    tried: frozenset[int] = frozenset()
    contenders: tuple[int, ...] = ()
    losses: Counter[int] = field(default_factory=Counter)


@dataclass
class Search:
    """One workload: `left()` are the seconds it still has, `told(best)` hears the best ratio to the default so far."""

    bench: Bench
    piece: Workpiece
    left: Callable[[], float]
    told: Callable[[float], None]
    before: frozenset[int] = frozenset()  # places that were tried in earlier runs
    incumbent: Mapping[str, Any] | None = None  # settings that an earlier run found best
    carried: Carried = field(default_factory=Carried)
    failures: list[str] = field(default_factory=list, init=False)
    _expected: float = field(default=0.01, init=False)

    def run(self) -> Found:
        """Raises MeasureError where not even the default can be measured, DeviceLostError."""
        choice = self.piece.site.made.choice
        space = choice.space()
        self._settings = [settings_of(candidate) for candidate in space]
        tried = self.before | self.carried.tried.difference(self.carried.contenders) | self._given_up()
        (default,) = self._build([0], space)
        if default is None:
            raise MeasureError(self.failures[-1])
        entrants: dict[int, Entrant] = {0: default}
        ratios: dict[int, float] = {}
        alone = self._times(entrants, [], Rung(2, FIRST.seconds, 1))
        if 0 in alone:
            self._expected = geometric_mean([statistics.median(turns) for turns in alone[0].seconds])
        pending = self._order(len(space), tried)
        pace = 0.0
        while pending and self.left() > pace + self._last_rungs():
            begin = self.left()
            batch = self._batch(pending)
            built = self._build(batch, space)
            entrants |= {place: entrant for place, entrant in zip(batch, built, strict=True) if entrant is not None}
            ratios |= self._race(entrants, [place for place in batch if place in entrants], FIRST)
            tried |= {0, *batch}
            again = (place for place in self.carried.contenders if place not in ratios)
            self.carried.tried, self.carried.contenders = tried, (*_best(ratios, FIRST.kept), *again)
            pace = max(pace, begin - self.left())
            kept = {0, *_best(ratios, FIRST.kept)}
            entrants = {place: entrant for place, entrant in entrants.items() if place in kept}  # weights take room
            self.told(min(ratios.values(), default=1.0))
            pending = self._reordered([place for place in pending if place not in batch], ratios)
        best, seconds, default_seconds = self._finish(entrants, ratios)
        return Found(space[best], seconds, default_seconds, tried, len(space), tuple(self.failures))

    # Order ------------------------------------------------------------------------------------------------------------
    def _given_up(self) -> frozenset[int]:
        """Candidates that devices are lost with, one after the other."""
        found = frozenset(place for place, count in self.carried.losses.items() if count >= MOST_LOSSES)
        if 0 in found:
            raise MeasureError(f"{MOST_LOSSES} devices were lost with the default on them")
        for place in sorted(found):
            self._drop(place, f"not measured: {MOST_LOSSES} devices were lost with it on them")
        return found

    def _batch(self, pending: Sequence[int]) -> Sequence[int]:
        """The next ones; what a device was lost with is measured alone."""
        losses = self.carried.losses
        return pending[:1] if losses[pending[0]] else [place for place in pending if not losses[place]][:BATCH]

    def _order(self, count: int, tried: Set[int]) -> list[int]:
        """Places to try: what was found best before, then by the cost model, the far end shuffled."""
        rest = [place for place in range(1, count) if place not in tried]
        later = rest[_SPARED:]
        random.Random(self.bench.seed).shuffle(later)
        best = [place for place in range(1, count) if self._settings[place] == dict(self.incumbent or {})]
        lost = self.carried.losses
        known = [each for each in dict.fromkeys((*best, *self.carried.contenders)) if lost[each] < MOST_LOSSES]
        return [*known, *(place for place in (*rest[:_SPARED], *later) if place not in known)]

    def _reordered(self, pending: Sequence[int], ratios: Mapping[int, float]) -> list[int]:
        """By what candidates with the same settings took, each setting for itself; ties stay in their order."""
        known: dict[Any, list[float]] = {}
        for place, ratio in ratios.items():
            for item in self._settings[place].items():
                known.setdefault(item, []).append(math.log(ratio))
        if not known:
            return list(pending)

        def expected(place: int) -> float:
            found = [statistics.mean(known[item]) for item in self._settings[place].items() if item in known]
            return statistics.mean(found) if found else 0.0

        return sorted(pending, key=expected)

    # Measuring --------------------------------------------------------------------------------------------------------
    def _build(self, places: Sequence[int], space: Sequence[Any]) -> list[Entrant | None]:
        built = self.bench.build(self.piece, [space[place] for place in places])
        for place, entrant in zip(places, built, strict=True):
            if isinstance(entrant, str):
                self._drop(place, f"not built: {entrant}")
        return [None if isinstance(entrant, str) else entrant for entrant in built]

    def _race(self, entrants: dict[int, Entrant], places: Sequence[int], rung: Rung) -> dict[int, float]:
        """The ratio of each of the places to the default; what fails or is wrong is dropped."""
        times = self._times(entrants, places, rung)
        return {place: _ratio(times[0], times[place]) for place in places if place in times}

    def _times(self, entrants: dict[int, Entrant], places: Sequence[int], rung: Rung) -> dict[int, Times]:
        racing = [entrants[place] for place in (0, *places)]
        try:
            results = self.bench.race(racing, rung.turns, rung.seconds, self._expected)
        except DeviceLostError:
            self.carried.losses.update(places or [0])
            raise
        found: dict[int, Times] = {}
        tolerance = self.piece.site.made.choice.tolerance
        for place, result in zip((0, *places), results, strict=True):
            if isinstance(result, str):
                self._drop(place, f"not measured: {result}")
            elif result.difference > tolerance:
                self._drop(place, f"wrong: its results differ by {result.difference:.1e} of the largest")
            else:
                found[place] = result
                continue
            entrants.pop(place, None)
        return found

    def _drop(self, place: int, reason: str) -> None:
        said = " ".join(f"{name}={value}" for name, value in self._settings[place].items())
        self.failures.append(f"{self.piece.site.made.choice.workload}: {said}: {reason}")

    def _last_rungs(self) -> float:
        """Seconds that the rungs after the first take."""
        cases = len(self.piece.points)
        sides = (FIRST.kept + 1, *(rung.kept + 1 for rung in LATER))
        rungs = (*LATER, LAST)
        turns = sum(
            rung.turns * count * max(rung.seconds, 3 * self._expected) for rung, count in zip(rungs, sides, strict=True)
        )
        return turns * cases + 0.3 * len(rungs)

    def _finish(self, entrants: dict[int, Entrant], ratios: dict[int, float]) -> tuple[int, float, float]:
        """(place, seconds, seconds of the default): the winner, or the default."""
        best = [place for place in _best(ratios, FIRST.kept) if ratios[place] < 1]
        for rung in LATER:
            ratios = self._race(entrants, best, rung) if best else {}
            best = [place for place in _best(ratios, rung.kept) if ratios[place] < 1]
        if not best:
            return 0, self._expected, self._expected
        times = self._times(entrants, best, LAST)
        default = geometric_mean([statistics.median(turns) for turns in times[0].seconds])
        for place in best:
            if place in times and _is_faster(times[0], times[place]):
                return place, geometric_mean([statistics.median(turns) for turns in times[place].seconds]), default
        return 0, default, default


def _best(ratios: Mapping[int, float], count: int) -> list[int]:
    """The places of the least ratios."""
    return sorted(ratios, key=lambda place: (ratios[place], place))[:count]


def _ratio(default: Times, candidate: Times) -> float:
    """Of the default's time: the geometric mean over the cases of the median over turns."""
    pairs = zip(default.seconds, candidate.seconds, strict=True)
    return geometric_mean([statistics.median(_ratios(*pair)) for pair in pairs])


def _ratios(default: Sequence[float], candidate: Sequence[float]) -> list[float]:
    return [mine / other for other, mine in zip(default, candidate, strict=True)]


def _is_faster(default: Times, candidate: Times) -> bool:
    """Faster by more than the spread: in three of four turns over all cases, and slower in the median of none."""
    every = [_ratios(*pair) for pair in zip(default.seconds, candidate.seconds, strict=True)]
    if any(statistics.median(ratios) > 1 for ratios in every):
        return False
    together = [geometric_mean(turn) for turn in zip(*every, strict=True)]
    return statistics.median(together) < _MARGIN and statistics.quantiles(together, n=4)[2] < 1
