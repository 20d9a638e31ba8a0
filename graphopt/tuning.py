"""Tuning a model's kernels: where its time goes, and the search for better configurations within some seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.arrays import array_of
from graphopt.compile import Compilation, prepare
from graphopt.database import Database, open_store
from graphopt.errors import UsageError
from graphopt.program import Program
from graphopt.progress import tell
from graphopt.runtime import gpu

if TYPE_CHECKING:
    from graphopt.backends.tuner.bench import Point
    from graphopt.backends.tuner.device import Device
    from graphopt.backends.tuner.session import Outcome
    from graphopt.backends.tuner.store import Store
    from graphopt.backends.tuner.task_queue import Task

_LARGER = 4  # a size that is open is measured up to so many times its example


def tune(
    programs: Program | Mapping[str, Program],
    target: str = "cpu",
    *,
    seconds: float,
    database: Database = None,
    threads: int | None = None,
    seed: int = 0,
    rpc: tuple[str, str] | None = None,
) -> Outcome:
    """Search for `seconds` seconds; `compile` with the same `database` uses what is found.

    `seed` decides the order in which candidates are tried, and the inputs of kernels. `rpc` is "host:port" of TVM's RPC
    tracker and the key of the devices to measure on, in place of this machine. Raises as `compile` does, and
    DeviceLostError where the last of the devices is gone; what was found until then is kept.
    """
    return tune_compilation(prepare(programs, target, threads), open_store(database), seconds, seed, rpc)


def check_tunable(target: Any) -> None:
    """Raises UsageError for one whose kernels run on a GPU: how fast they are is not measured anywhere."""
    if any(feature.startswith(gpu.PREFIX) for feature in target.features):
        raise UsageError(f"kernels for {target.name} run on a GPU and cannot be tuned yet; compile without tuning")


def tune_compilation(
    compilation: Compilation, store: Store, seconds: float, seed: int = 0, rpc: tuple[str, str] | None = None
) -> Outcome:
    """The same of what is prepared."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise UsageError(f"tuning for {seconds!r} seconds is not possible; give a number above 0")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed!r} is none; give an integer from 0 to 2**63 - 1")
    check_tunable(compilation.target)
    from graphopt.backends.tuner import building
    from graphopt.backends.tuner.bench import Bench
    from graphopt.backends.tuner.session import Session, Station

    end = time.monotonic() + seconds
    devices, lost = _devices(compilation.target, rpc)
    builder = building.Builder(compilation.target)
    try:
        tell("measuring where the time goes", 0, 1)
        hardware = devices[0].hardware
        module = compilation.lower(store, hardware)
        feeds = {name: _feed(program) for name, program in compilation.entries.items()}
        taken = devices[0].kernel_seconds(compilation.trial(compilation.assemble(module), module), feeds)
        tasks = find_tasks(module, taken, compilation.functions)
        cold = sum(array.nbytes for array in module.weights.values())
        stations = [
            Station(Bench(compilation.target, builder, each.measurer, cold, seed, each.kernels), each.provenance)
            for each in devices
        ]
        outcome = Session(tasks, stations, store, hardware, end - time.monotonic()).run()
        return replace(outcome, failures=(*lost, *outcome.failures))
    finally:
        builder.close()
        for each in devices:
            each.close()


def _devices(target: Any, rpc: tuple[str, str] | None) -> tuple[Sequence[Device], list[str]]:
    """Where to measure, and what is missing there."""
    if rpc is None:
        from graphopt.backends.tuner.device import ThisMachine

        return [ThisMachine(target)], []
    from graphopt.backends.tuner.remote import find_devices

    return find_devices(*rpc, target)


def _feed(program: Program) -> dict[str, Any]:
    """Its examples."""
    return {spec.name: array_of(value) for spec, value in zip(program.inputs, program.examples, strict=True)}


def find_tasks(module: Any, seconds: Mapping[str, float], programs: Mapping[str, Program]) -> list[Task]:
    """The workloads of a module, each measured where it takes the most time; `seconds` are those of its kernels."""
    from graphopt.backends.tuner.bench import Workpiece, fitting
    from graphopt.backends.tuner.task_queue import Task

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
