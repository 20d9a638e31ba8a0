"""Races on this machine, in a child process: a kernel that crashes, hangs or eats memory ends that process alone."""

from __future__ import annotations

import os

from graphopt.backends.tuner.child import Child, ChildError
from graphopt.backends.tuner.measuring import MeasureError, Race, Times
from graphopt.backends.tuner.race_message import pack_race, unpack_times


def half_of_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class LocalMeasurer:
    """Starts its child with the first race."""

    def __init__(self, memory: int | None = None) -> None:
        self._child = Child("graphopt.backends.tuner.race_message:serve", memory or half_of_memory())

    def race(self, race: Race, limit: float) -> list[Times]:
        """As `Measurer` has it."""
        try:
            value, _ = self._child.ask(*pack_race(race), limit)
        except ChildError as e:
            raise MeasureError(str(e)) from e
        return unpack_times(value)

    def close(self) -> None:
        """End the child."""
        self._child.close()
