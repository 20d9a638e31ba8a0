"""Timing every kernel of a run from inside the virtual machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from graphopt.runtime.library import ffi

_LEAST = 1e-8  # seconds, for a kernel that seems to take no time
_NOT_KERNELS = ("vm.", "shape_func")  # the machine's own bookkeeping


Round = dict[str, list[float]]  # kernel -> seconds of each of its calls in one run


def time_calls(machine: Any, run: Callable[[], object], rounds: int) -> list[Round]:
    """Call `run` once untimed and `rounds` times timed; what each of these took, kernel by kernel.

    Kernels only: functions that call others, and the machine's own builtins, are left out. What taking the time costs
    is taken off: the cheapest builtin does next to nothing, so its time is that. `machine` keeps the instrument, so it
    should serve nothing else.
    """
    spans: Round = {}
    builtins: Round = {}
    open_calls: list[list[Any]] = []  # [start, calls made inside]

    def instrument(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        if before:
            if open_calls:
                open_calls[-1][1] += not name.startswith(_NOT_KERNELS)
            open_calls.append([time.perf_counter(), 0])
            return
        end = time.perf_counter()
        start, inner = open_calls.pop()
        if not inner:
            kind = builtins if name.startswith(_NOT_KERNELS) else spans
            kind.setdefault(name, []).append(end - start)

    machine["set_instrument"](ffi().convert(instrument))
    run()
    builtins.clear()
    found = []
    for _ in range(rounds):
        spans = {}
        run()
        found.append(spans)
    cost = min(map(statistics.median, builtins.values()), default=0.0)
    return [
        {name: [max(each - cost, _LEAST) for each in seconds] for name, seconds in spans.items()} for spans in found
    ]


def medians(rounds: Sequence[Round]) -> dict[str, tuple[float, float]]:
    """kernel -> (calls a run, median seconds a call)."""
    calls: Round = {}
    for spans in rounds:
        for name, seconds in spans.items():
            calls.setdefault(name, []).extend(seconds)
    return {name: (len(seconds) / len(rounds), statistics.median(seconds)) for name, seconds in calls.items()}
