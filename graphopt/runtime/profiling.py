"""Timing every kernel of a run from inside the virtual machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from graphopt.runtime.library import ffi

_LEAST = 1e-8  # seconds, for a kernel that seems to take no time
_NOT_KERNELS = ("vm.", "shape_func")  # the machine's own bookkeeping


def profile_calls(machine: Any, run: Callable[[], object], rounds: int) -> dict[str, tuple[float, float]]:
    """Call `run` once untimed and `rounds` times timed: kernel name -> (calls a run, median seconds a call).

    Kernels only: functions that call others, and the machine's own builtins, are left out. What taking the time costs
    is taken off: the cheapest builtin does next to nothing, so its time is that. `machine` keeps the instrument, so it
    should serve nothing else.
    """
    spans: dict[str, list[float]] = {}
    builtins: dict[str, list[float]] = {}
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
    spans.clear()
    builtins.clear()
    for _ in range(rounds):
        run()
    cost = min(map(statistics.median, builtins.values()), default=0.0)
    return {name: (len(times) / rounds, max(statistics.median(times) - cost, _LEAST)) for name, times in spans.items()}
