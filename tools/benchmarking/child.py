"""The process of one side: opens it, then measures one turn for every line on stdin.

Protocol, one JSON value a line. In: the configuration, then {"seconds": s} for each turn. Out: what was opened, then
the seconds of each call; or {"error": ...}. Results of the first call go to an .npz file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from graphopt.tools.benchmarking.usage import peak_memory

PR_SET_PDEATHSIG = 1
WARM_UP = 0.5  # seconds of calls before anything is measured: thread pools, page faults, clock frequency
LEAST_CALLS = 3


def main() -> None:
    # A stopped process cannot notice that its parent is gone: the kernel ends it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    configuration = json.loads(sys.stdin.readline())
    try:
        call, about = open_side(configuration)
    except Exception as e:
        answer(replies, {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"})
        return
    answer(replies, about)
    for line in sys.stdin:
        answer(replies, measure_turn(call, json.loads(line)["seconds"]))


def answer(replies: IO[str], value: Any) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def open_side(configuration: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    os.sched_setaffinity(0, configuration["cores"])
    import numpy as np

    from graphopt.tools.benchmarking.sides import SIDES

    with np.load(configuration["inputs"]) as arrays:
        feed = dict(arrays)
    begin = time.perf_counter()
    opened = SIDES[configuration["side"]](configuration["model"], feed, len(configuration["cores"]))
    load_seconds = time.perf_counter() - begin
    np.savez(configuration["outputs"], *opened.call())
    measure_turn(opened.call, WARM_UP)
    peak = peak_memory()
    return opened.call, {"about": opened.about, "load_seconds": load_seconds, "peak_bytes": peak}


def measure_turn(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call for at least `seconds`; the first finds other sides' data in the caches and is left out."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or len(times) < LEAST_CALLS:
        call()
        times.append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    main()
