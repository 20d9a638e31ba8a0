"""Which of two programs is faster on the target, as measured: both compiled, running in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from graphopt.arrays import array_of
from graphopt.contract import Timing
from graphopt.database import Database
from graphopt.errors import ArtifactError, CompileError, UsageError
from graphopt.program import Program
from graphopt.turns import in_turns

if TYPE_CHECKING:
    from graphopt.runtime.session import InferenceSession

TURNS = 21
SECONDS = 0.01  # least length of a turn


@dataclass(frozen=True)
class Outcome:
    """Median seconds of one run of each, and whether the second is faster in at least three of four turns."""

    first: Timing
    second: Timing
    faster: bool


Race = Callable[[Program, Program], Outcome]


def race_on(target: str, threads: int | None, database: Database = None) -> Race:
    """A race on this machine; `database` as in `compile`.

    It raises UsageError where code for `target` does not run here, CompileError where a program has no lowering for it.
    """

    def race(first: Program, second: Program) -> Outcome:
        try:
            runs = [_prepare(program, target, threads, database) for program in (first, second)]
        except CompileError as error:
            raise CompileError(f"keep_if_faster cannot measure {second.name}: {error}; leave it out") from error
        times = take_turns(runs)
        ratios = [after / before for before, after in zip(*times, strict=True)]
        before, after = (Timing(statistics.median(side), len(side)) for side in times)
        return Outcome(before, after, statistics.quantiles(ratios, n=4)[2] < 1)

    return race


def measure_on(target: str, threads: int | None, database: Database = None) -> Callable[[Program], Timing | None]:
    """What `PassContext.measure` is: the time of one run of a program, None where `target` does not run here."""

    def measure(program: Program) -> Timing | None:
        try:
            run = _prepare(program, target, threads, database)
        except UsageError:
            return None
        times = [_seconds(run, _count(run)) for _ in range(TURNS)]
        return Timing(statistics.median(times), TURNS)

    return measure


def _prepare(program: Program, target: str, threads: int | None, database: Database) -> Callable[[], object]:
    from graphopt.compile import compile

    try:
        session: InferenceSession = compile(program, target, database=database, threads=threads).session(threads)
    except ArtifactError as error:
        raise UsageError(f"nothing can be measured for target {target!r} on this machine: {error}") from error
    feed = {spec.name: array_of(value) for spec, value in zip(program.inputs, program.examples, strict=True)}
    return lambda: session.run(None, feed)


def take_turns(runs: Sequence[Callable[[], object]], turns: int = TURNS, seconds: float = SECONDS) -> list[list[float]]:
    """Seconds of one run in every turn of each."""
    counts = [_count(run, seconds) for run in runs]
    return in_turns([partial(_seconds, run, count) for run, count in zip(runs, counts, strict=True)], turns)


def _count(run: Callable[[], object], seconds: float = SECONDS) -> int:
    """Runs that fill a turn; the first one warms up."""
    run()
    return max(1, math.ceil(seconds / _seconds(run, 1)))


def _seconds(run: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
