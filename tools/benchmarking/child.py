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
from typing import IO, TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.tools.benchmarking.usage import peak_memory

if TYPE_CHECKING:
    from graphopt.tools.benchmarking.sides import Opened

PR_SET_PDEATHSIG = 1
WARM_UP = 0.5  # seconds of calls before anything is measured: thread pools, page faults, clock frequency
LEAST_CALLS = 3
LONGEST = 300  # characters of an error


def main() -> None:
    # A stopped process cannot notice that its parent is gone: the kernel ends it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    configuration = json.loads(sys.stdin.readline())
    sparing = configuration["sparing"]
    try:
        opened, about = open_side(configuration)
    except Exception as e:
        answer(replies, {"error": why(e)})
        return
    answer(replies, about)
    for line in sys.stdin:
        answer(replies, measure_turn(opened, json.loads(line)["seconds"], sparing))


def why(error: Exception) -> str:
    """One line; errors that are graphopt's own are sentences already."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    return text if isinstance(error, GraphoptError) else f"{type(error).__name__}: {text}"


def answer(replies: IO[str], value: Any) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def open_side(configuration: dict[str, Any]) -> tuple[Opened, dict[str, Any]]:
    os.sched_setaffinity(0, configuration["cores"])
    import numpy as np

    from graphopt.tools.benchmarking.sides import find_side

    with np.load(configuration["inputs"]) as arrays:
        feed = dict(arrays)
    begin = time.perf_counter()
    opened = find_side(configuration["side"])(configuration["model"], feed, len(configuration["cores"]))
    load_seconds = time.perf_counter() - begin
    np.savez(configuration["outputs"], *opened.call())
    if not configuration["sparing"]:
        measure_turn(opened, WARM_UP, False)
    peak = peak_memory()
    return opened, {"about": opened.about, "load_seconds": load_seconds, "peak_bytes": peak}


def measure_turn(opened: Opened, seconds: float, sparing: bool) -> list[float]:
    """Seconds of each call for at least `seconds`; the first finds other sides' data in the caches and is left out.

    Sparing: one call is enough, and the first counts.
    """
    measure = opened.measure or (lambda: wall(opened.call))
    times = measure()
    if sparing and len(times) * times[0] >= seconds:
        return times
    times.clear()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < LEAST_CALLS:
        times += measure()
    return times


def wall(call: Callable[[], Any]) -> list[float]:
    begin = time.perf_counter()
    call()
    return [time.perf_counter() - begin]


if __name__ == "__main__":
    main()
