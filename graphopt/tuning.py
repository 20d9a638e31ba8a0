"""Tuning a model's kernels: where its time goes, and the search for better configurations within some seconds."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphopt.arrays import array_of
from graphopt.compile import Compilation, prepare
from graphopt.database import Database, hardware_of, open_store
from graphopt.errors import UsageError
from graphopt.program import Program
from graphopt.progress import tell
from graphopt.runtime.features import missing

if TYPE_CHECKING:
    from graphopt.backends.tuner.bench import Point
    from graphopt.backends.tuner.measuring import Measurer
    from graphopt.backends.tuner.session import Outcome, Task

_ROUNDS = 10  # runs of the model that tell where its time goes
_LARGER = 4  # a size that is open is measured up to so many times its example


def tune(
    programs: Program | Mapping[str, Program],
    target: str = "cpu",
    *,
    seconds: float,
    database: Database = None,
    threads: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Search for `seconds` seconds; `compile` with the same `database` uses what is found. `seed` decides the order in
    which candidates are tried, and the inputs of kernels. Raises as `compile` does."""
    return tune_compilation(prepare(programs, target, threads), open_store(database), seconds, seed)


def tune_compilation(
    compilation: Compilation, store: Any, seconds: float, seed: int = 0, measurer: Measurer | None = None
) -> Outcome:
    """The same of what is prepared; `measurer` is where kernels run, by default a child process on this machine."""
    _check(compilation, seconds, seed)
    import time

    from graphopt.backends.tuner.bench import Bench
    from graphopt.backends.tuner.building import Builder
    from graphopt.backends.tuner.local import LocalMeasurer
    from graphopt.backends.tuner.machine import provenance
    from graphopt.backends.tuner.session import Session

    end = time.monotonic() + seconds
    tell("measuring where the time goes", 0, 1)
    module = compilation.lower(store)
    tasks = find_tasks(module, kernel_seconds(compilation, module), compilation.functions)
    cold = sum(array.nbytes for array in module.weights.values())
    builder, measurer = Builder(compilation.target), measurer or LocalMeasurer()
    try:
        bench = Bench(compilation.target, builder, measurer, cold, seed)
        hardware = hardware_of(compilation.target)
        return Session(tasks, bench, store, hardware, provenance, end - time.monotonic()).run()
    finally:
        builder.close()
        measurer.close()


def _check(compilation: Compilation, seconds: float, seed: int) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise UsageError(f"tuning for {seconds!r} seconds is not possible; give a number above 0")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed!r} is none; give an integer from 0 to 2**63 - 1")
    target = compilation.target
    if lacking := missing(target.features):
        raise UsageError(f"nothing can be measured for {target.name} here: this machine lacks {', '.join(lacking)}")
    available = len(os.sched_getaffinity(0))
    if target.threads > available:
        raise UsageError(f"threads is {target.threads} and this process may use {available} CPUs; tune with fewer")


def kernel_seconds(compilation: Compilation, module: Any) -> dict[str, float]:
    """What each kernel takes of one run of all entries on their examples."""
    session = compilation.assemble(module).session(compilation.target.threads)
    taken: dict[str, float] = defaultdict(float)
    for name, program in compilation.entries.items():
        feed = {spec.name: array_of(value) for spec, value in zip(program.inputs, program.examples, strict=True)}
        rounds = session.profile_rounds(feed, name, _ROUNDS)
        for kernel in {kernel for each in rounds for kernel in each}:
            taken[kernel] += statistics.median(sum(each.get(kernel, ())) for each in rounds)
    return taken


def find_tasks(module: Any, seconds: Mapping[str, float], programs: Mapping[str, Program]) -> list[Task]:
    """The workloads of a module, each measured where it takes the most time."""
    from graphopt.backends.tuner.bench import Workpiece, fitting
    from graphopt.backends.tuner.session import Task

    total = sum(seconds.values()) or 1.0
    sites: dict[str, dict[str, Any]] = defaultdict(dict)  # equal kernels are one
    for site in module.choices.sites:
        sites[site.made.choice.workload.key].setdefault(site.kernel, site)
    tasks = []
    for found in sites.values():
        first = max(found.values(), key=lambda site: seconds.get(site.kernel, 0.0))
        points = fitting(first, points_of(programs[first.lowering.kernels.entry]))
        share = sum(seconds.get(kernel, 0.0) for kernel in found) / total
        tasks.append(Task(Workpiece(first, points), tuple(found), share))
    return tasks


def points_of(program: Program) -> list[Point]:
    """Sizes to measure at, by symbol: the example's, the least, and the most, or some times the example's."""
    example = program.bind(program.examples)
    least = {name: program.sizes[name].low for name in example}
    most = {name: min(program.sizes[name].high or _LARGER * size, _LARGER * size) for name, size in example.items()}
    return [
        {symbol: sizes[name] for symbol, name in program.symbols.items() if name in sizes}
        for sizes in (example, least, most)
    ]
