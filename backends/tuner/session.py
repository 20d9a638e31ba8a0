"""Tuning a model: its workloads get their share of the seconds, and what is found is in the store at once.

A workload is one record: Ctrl-C loses the one that is being measured. A record says which candidates were tried, so
that the next run goes on where this one ended, and one that has nothing left to try changes nothing.

Several devices take workloads from one queue. What is compared was measured on one of them; when it is lost, the next
that is free goes on with the workload.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass

from graphopt.backends.choice import settings_of
from graphopt.backends.tuner.bench import Bench
from graphopt.backends.tuner.measuring import DeviceLostError, MeasureError
from graphopt.backends.tuner.record import Hardware, Record, Setting, Workload
from graphopt.backends.tuner.search import Carried, Found, Search
from graphopt.backends.tuner.store import Store
from graphopt.backends.tuner.task_queue import Task, TaskQueue
from graphopt.progress import tell

LEAST = 4.0  # seconds below which a workload is not worth beginning with

Clock = Callable[[], float]


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


@dataclass(frozen=True)
class Station:
    """A device at work: where candidates are measured, and what the records say of it."""

    bench: Bench
    provenance: Callable[[], Mapping[str, str]]


@dataclass
class Session:
    """One run of `seconds` seconds on devices of one kind."""

    tasks: Sequence[Task]
    stations: Sequence[Station]
    store: Store
    hardware: Hardware
    seconds: float
    clock: Clock = time.monotonic

    def run(self) -> Outcome:
        """Raises WriteError where the store cannot be written, DeviceLostError where the last device is gone."""
        self._end = self.clock() + self.seconds
        self._failures: list[str] = []
        self._new: set[str] = set()
        self._known = {task.workload.key: self._knowledge(task) for task in self.tasks}
        self._carried: dict[str, Carried] = defaultdict(Carried)
        self._shared = threading.Lock()  # the store, and what is known from it
        tasks = sorted(self.tasks, key=lambda task: -task.share)
        self._queue = TaskQueue(task for task in tasks if not self._known[task.workload.key].exhausted)
        self._at_work = len(self.stations)
        try:
            if len(self.stations) == 1:
                self._work(self.stations[0])
            else:
                self._work_together()
        except DeviceLostError as e:
            raise DeviceLostError(f"no device is left, {e}; start its server and tune again to go on from here") from e
        return Outcome(tuple(map(self._row, tasks)), tuple(self._failures))

    # Devices ----------------------------------------------------------------------------------------------------------
    def _work_together(self) -> None:
        """Each device in a thread of its own. Raises DeviceLostError where none is left."""
        with ThreadPoolExecutor(len(self.stations)) as threads:
            try:
                working = [threads.submit(copy_context().run, self._work, station) for station in self.stations]
                for done in as_completed(working):
                    if isinstance(lost := done.exception(), DeviceLostError) and self._at_work:
                        self._failures.append(str(lost))
                    else:
                        done.result()
            except BaseException:
                self._stop()
                raise

    def _stop(self) -> None:
        """What threads wait for ends, and they with it."""
        self._queue.stop()
        for station in self.stations:
            station.bench.measurer.close()
            station.bench.builder.close()

    def _work(self, station: Station) -> None:
        """Take tasks until none is left or the time is over. Raises DeviceLostError."""
        while self._left() >= LEAST and (task := self._queue.take()) is not None:
            try:
                again = self._left() < LEAST or self._tune(station, task)
            except BaseException:
                with self._shared:
                    self._at_work -= 1
                self._queue.put_back(task)
                raise
            self._queue.done(task, again)

    def _left(self) -> float:
        return self._end - self.clock()

    def _tune(self, station: Station, task: Task) -> bool:
        """Give the task its share of what is left; whether something is left to try."""
        known = self._known[task.workload.key]
        portion = min(1.0, self._at_work * self._queue.portion(task))
        until = self.clock() + max(LEAST, self._left() * portion)
        stage = str(task.workload)

        def told(ratio: float) -> None:
            said = f"best {min(ratio, 1.0):.3f} of the default's time, {max(0.0, self._left()):.0f} s left"
            tell(f"{stage}: {said}", len(self._new), len(self.tasks))

        told(known.ratio)
        search = Search(
            station.bench,
            task.piece,
            lambda: min(until, self._end) - self.clock(),
            told,
            known.tried,
            known.settings,
            self._carried[task.workload.key],
        )
        try:
            found = search.run()
        except MeasureError as e:
            self._failures.append(f"{stage}: {e}")
            return False
        finally:
            self._failures += search.failures
        if found.tried <= known.tried:  # the time was too short for a kernel as slow as this one
            return False
        self._commit(station, task, found)
        return not found.exhausted

    def _commit(self, station: Station, task: Task, found: Found) -> None:
        about = {"seed": str(station.bench.seed), "tried": _mask(found.tried), "space": str(found.space)}
        record = Record(
            task.workload,
            self.hardware,
            settings_of(found.configuration),
            found.seconds,
            found.default_seconds,
            {**station.provenance(), **about},
        )
        with self._shared:
            self.store.append(record)
            self._new.add(task.workload.key)
            self._known[task.workload.key] = self._knowledge(task)
        self._carried.pop(task.workload.key)

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
