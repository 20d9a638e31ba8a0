"""One queue of workloads for all devices."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.backends.tuner.bench import Workpiece
from graphopt.backends.tuner.record import Workload


@dataclass(frozen=True, eq=False)
class Task:
    """A workload of the model: the kernel to measure, all kernels it stands for, and their share of the time."""

    piece: Workpiece
    kernels: tuple[str, ...]
    share: float

    @property
    def workload(self) -> Workload:
        return self.piece.site.made.choice.workload


class TaskQueue:
    """Tasks in the order given, in rounds: what has something left to try comes again when all had their turn.

    Any thread may take one; it says what became of it by `done` or `put_back`.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._round, self._later = deque(tasks), deque[Task]()
        self._running: list[Task] = []
        self._changed = threading.Condition()
        self._stopped = False

    def take(self) -> Task | None:
        """The next one, which may be one that another thread is about to put back; None where all is done."""
        with self._changed:
            while not self._stopped:
                if not self._round:
                    self._round, self._later = self._later, self._round
                if self._round:
                    self._running.append(self._round.popleft())
                    return self._running[-1]
                if not self._running:
                    return None
                self._changed.wait()
        return None

    def portion(self, task: Task) -> float:
        """Of the time that all devices have left for this round, what belongs to a task that was taken."""
        with self._changed:
            return task.share / (sum(each.share for each in (*self._running, *self._round)) or 1.0)

    def done(self, task: Task, again: bool) -> None:
        """`again` where something is left to try."""
        with self._changed:
            self._running.remove(task)
            if again:
                self._later.append(task)
            self._changed.notify_all()

    def put_back(self, task: Task) -> None:
        """For the next thread that takes one."""
        with self._changed:
            self._running.remove(task)
            self._round.appendleft(task)
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody gets any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
