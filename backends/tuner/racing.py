"""Running a race on the device: opens libraries, makes arguments, and lets entrants take turns; imports no compiler."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from graphopt.backends.tuner.measuring import REFRESH, Argument, Case, Race, Times
from graphopt.backends.tuner.race_memory import FLOATS, Memory, viewed, words_of
from graphopt.runtime.library import open_kernels
from graphopt.runtime.session import SET_DENORMALS
from graphopt.runtime.tensors import aligned_copy, to_device, widen
from graphopt.runtime.threads import Runner
from graphopt.turns import in_turns

LEAST_CALLS = 3  # of a turn


@dataclass(frozen=True, eq=False)
class _Run:
    """One entrant in one case: a call with the model's weights, then calls with cold ones."""

    function: Any
    arguments: list[Any]
    cold: Iterator[list[Any]]
    refresh: Callable[[], None]
    outputs: list[tuple[np.ndarray, str]]

    def results(self) -> list[np.ndarray]:
        """Of one call."""
        self.function(*self.arguments)
        return [widen(array, dtype).copy() for array, dtype in self.outputs]

    def turn(self, seconds: float) -> float:
        """The time that a quarter of the calls do not exceed: others can only make them longer.

        There are as many calls as fill the seconds, or three times as many with what is done between.
        """
        times: list[float] = []
        spent, end = 0.0, time.perf_counter() + 3 * seconds
        while (spent < seconds and time.perf_counter() < end) or len(times) < LEAST_CALLS:
            self.refresh()
            arguments = next(self.cold)
            begin = time.perf_counter()
            self.function(*arguments)
            times.append(time.perf_counter() - begin)
            spent += times[-1]
        return sorted(times)[(len(times) - 1) // 4]


def run_race(race: Race) -> list[Times]:
    """On the calling machine, with its pool of threads."""
    support, memory = _open(race.support), Memory(race)
    refresh = support.get_function(REFRESH, query_imports=True)
    flush = support.get_function(SET_DENORMALS, query_imports=True)
    runs = []
    for entrant in race.entrants:
        function = _open(entrant.library).get_function(entrant.function, query_imports=True)
        runs.append([_prepare(function, case, place, memory, refresh) for place, case in enumerate(entrant.cases)])

    def take() -> tuple[list[float], list[list[float]]]:
        flush(1, race.threads)
        wanted = [run.results() for run in runs[0]]
        apart = [difference([run.results() for run in each], wanted) for each in runs]
        turns = [partial(run.turn, race.seconds) for each in runs for run in each]
        return apart, in_turns(turns, race.turns)

    apart, taken = Runner(race.threads).run(take)
    times = iter(taken)
    return [
        Times(tuple(tuple(next(times)) for _ in each), difference) for each, difference in zip(runs, apart, strict=True)
    ]


def _open(library: bytes) -> Any:
    return open_kernels("tuning", library, hashlib.sha256(library).hexdigest())


def _prepare(function: Any, case: Case, number: int, memory: Memory, refresh: Any) -> _Run:
    arguments: list[Any] = []
    cold: dict[int, list[Any]] = {}
    written, outputs = [], []
    for place, argument in enumerate(case):
        if argument.role == "size":
            arguments.append(argument.number)
            continue
        if argument.role == "weight":
            array, cold[place] = _weight(argument, memory)
        elif argument.role == "input":
            words = memory.input(argument, number, place)
            written.append(to_device(words, "int32"))
            array = viewed(words, argument)
        else:
            array = viewed(words_of(argument), argument)
            outputs.append((array, argument.dtype))
        arguments.append(to_device(array, argument.dtype))

    def write_again() -> None:
        for data in written:
            refresh(data, 0)

    return _Run(function, arguments, _calls(arguments, cold), write_again, outputs)


def _weight(argument: Argument, memory: Memory) -> tuple[np.ndarray, list[Any]]:
    """Its values, and tensors at other places; none for integers, which may be indices."""
    assert argument.values is not None
    array = aligned_copy(argument.values, argument.values.dtype)
    places = memory.cold(argument) if argument.dtype in FLOATS else []
    return array, [to_device(each, argument.dtype) for each in places]


def _calls(arguments: Sequence[Any], cold: dict[int, list[Any]]) -> Iterator[list[Any]]:
    """The arguments of one call after the other."""
    for turn in itertools.count():
        found = list(arguments)
        for place, tensors in cold.items():
            if tensors:
                found[place] = tensors[turn % len(tensors)]
        yield found


def difference(results: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]]) -> float:
    """As `Times` has it, over all cases and outputs."""
    pairs = zip(itertools.chain(*results), itertools.chain(*wanted), strict=True)
    return max((_apart(a, b) for a, b in pairs), default=0.0)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    if not a.size or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    if a.dtype.kind != "f" or not np.array_equal(np.isnan(a), np.isnan(b)):
        return math.inf
    with np.errstate(all="ignore"):
        largest = max(np.nanmax(np.abs(b)), np.finfo(b.dtype).tiny)
        found = float(np.nanmax(np.abs(a.astype(np.float64) - b)) / largest)
    return found if math.isfinite(found) else math.inf
