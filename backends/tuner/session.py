"""Tuning a model: its workloads get their share of the seconds, and what is found is in the store at once.

A workload is one record: Ctrl-C loses the one that is being measured. A record says which candidates were tried, so
that the next run goes on where this one ended, and one that has nothing left to try changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graphopt.backends.choice import settings_of
from graphopt.backends.tuner.bench import Bench, Workpiece
from graphopt.backends.tuner.measuring import MeasureError
from graphopt.backends.tuner.record import Hardware, Record, Setting, Workload
from graphopt.backends.tuner.search import Found, Search
from graphopt.backends.tuner.store import Store
from graphopt.progress import tell

LEAST = 4.0  # seconds below which a workload is not worth beginning with

Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Task:
    """A workload of the model: the kernel to measure, all kernels it stands for, and their share of the time."""

    piece: Workpiece
    kernels: tuple[str, ...]
    share: float

    @property
    def workload(self) -> Workload:
        return self.piece.site.made.choice.workload


@dataclass(frozen=True)
class Row:
    """What is known of a workload after tuning: `seconds` are those of one call, None where nothing was measured.

    `tried` of `space` candidates were measured in this run or before; `new` tells whether this run measured any.
    """

    workload: Workload
    kernels: tuple[str, ...]
    share: float
    tried: int
    space: int
    default_seconds: float | None
    seconds: float | None
    configuration: Mapping[str, Setting]
    new: bool


@dataclass(frozen=True)
class Outcome:
    """All workloads, the largest share first, and what was dropped on the way and why."""

    rows: tuple[Row, ...]
    failures: tuple[str, ...]


@dataclass
class Session:
    """One run of `seconds` seconds."""

    tasks: Sequence[Task]
    bench: Bench
    store: Store
    hardware: Hardware
    provenance: Callable[[], Mapping[str, str]]
    seconds: float
    clock: Clock = time.monotonic

    def run(self) -> Outcome:
        """Raises WriteError where the store cannot be written."""
        self._end = self.clock() + self.seconds
        self._failures: list[str] = []
        self._new: set[str] = set()
        self._known = {task.workload.key: self._knowledge(task) for task in self.tasks}
        tasks = sorted(self.tasks, key=lambda task: -task.share)
        pending = [task for task in tasks if not self._known[task.workload.key].exhausted]
        while pending and self._left() >= LEAST:
            left = []
            for place, task in enumerate(pending):
                if self._left() < LEAST:
                    break
                if self._tune(task, pending[place:]):
                    left.append(task)
            pending = left
        return Outcome(tuple(map(self._row, tasks)), tuple(self._failures))

    def _left(self) -> float:
        return self._end - self.clock()

    def _tune(self, task: Task, pending: Sequence[Task]) -> bool:
        """Give the first of the pending tasks its share of what is left; whether something is left to try."""
        known = self._known[task.workload.key]
        total = sum(each.share for each in pending) or 1.0
        until = self.clock() + max(LEAST, self._left() * task.share / total)
        stage = str(task.workload)

        def told(ratio: float) -> None:
            said = f"best {min(ratio, 1.0):.3f} of the default's time, {max(0.0, self._left()):.0f} s left"
            tell(f"{stage}: {said}", len(self._new), len(self.tasks))

        told(known.ratio)
        search = Search(
            self.bench,
            task.piece,
            lambda: min(until, self._end) - self.clock(),
            told,
            known.tried,
            known.settings,
        )
        try:
            found = search.run()
        except MeasureError as e:
            self._failures.append(f"{stage}: {e}")
            return False
        self._failures += found.failures
        if found.tried <= known.tried:  # the time was too short for a kernel as slow as this one
            return False
        self._commit(task, found)
        return not found.exhausted

    def _commit(self, task: Task, found: Found) -> None:
        about = {"seed": str(self.bench.seed), "tried": _mask(found.tried), "space": str(found.space)}
        self.store.append(
            Record(
                task.workload,
                self.hardware,
                settings_of(found.configuration),
                found.seconds,
                found.default_seconds,
                {**self.provenance(), **about},
            )
        )
        self._new.add(task.workload.key)
        self._known[task.workload.key] = self._knowledge(task)

    # What is known ----------------------------------------------------------------------------------------------------
    def _knowledge(self, task: Task) -> _Knowledge:
        """From the store."""
        choice = task.piece.site.made.choice
        space = len(choice.space())
        best = self.store.lookup(task.workload, self.hardware)
        tried: frozenset[int] = frozenset()
        for record in self.store.records():
            same = record.workload.key == task.workload.key and record.hardware == self.hardware
            if same and record.provenance.get("space") == str(space):
                tried |= _places(record.provenance.get("tried", "0"))
        return _Knowledge(best, tried, space)

    def _row(self, task: Task) -> Row:
        known = self._known[task.workload.key]
        return Row(
            task.workload,
            task.kernels,
            task.share,
            len(known.tried),
            known.space,
            known.best.default_seconds if known.best else None,
            known.best.seconds if known.best else None,
            known.best.configuration if known.best else settings_of(task.piece.site.made.choice.default),
            task.workload.key in self._new,
        )


@dataclass(frozen=True)
class _Knowledge:
    best: Record | None
    tried: frozenset[int]
    space: int

    @property
    def exhausted(self) -> bool:
        return self.space < 2 or len(self.tried) >= self.space

    @property
    def settings(self) -> Mapping[str, Setting] | None:
        return self.best.configuration if self.best else None

    @property
    def ratio(self) -> float:
        return self.best.ratio if self.best else 1.0


def _mask(places: frozenset[int]) -> str:
    """Places as the bits of a hexadecimal number."""
    return f"{sum(1 << place for place in places):x}"


def _places(mask: str) -> frozenset[int]:
    try:
        bits = int(mask, 16)
    except ValueError:
        return frozenset()
    return frozenset(place for place in range(bits.bit_length()) if bits >> place & 1)
