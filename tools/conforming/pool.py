"""Runs tests in processes of limited memory and time: one that dies loses the test it was at, and nothing else.

Processes are forked from this one, so that the tests are in their memory already; it must not have imported torch or
tvm, whose threads do not survive a fork.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from graphopt.tools.conforming.cases import Case

MEMORY = 12 << 30  # bytes of address space for one process
_PATIENCE = 1.0  # seconds between looks at the clock
_LONGER = 20.0  # times the processor time of a test: the wall time after which it hangs


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    case: int | None = None
    since: float = 0.0
    done: int = 0


def run_all(cases: Sequence[Case], mode: str, processes: int, seconds: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each test with its record, in the order in which they end.

    `seconds` is the processor time that a test may take, which does not depend on what else the machine does.
    A test whose process dies after others is run once more in a new one, since what came before may be to blame.
    """
    waiting: deque[int] = deque(range(len(cases)))
    again: set[int] = set()
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                workers.append(_start(cases, mode, seconds, workers))
                _give(workers[-1], waiting.popleft())
            wait([worker.pipe for worker in workers], _PATIENCE)
            for worker in list(workers):
                number = worker.case
                assert number is not None
                record = _record(worker, seconds)
                if record is None:
                    continue
                if not worker.process.is_alive() and worker.done and number not in again:
                    again.add(number)
                    waiting.appendleft(number)
                else:
                    yield number, record
                worker.done += 1
                if waiting and worker.process.is_alive():
                    _give(worker, waiting.popleft())
                else:
                    _stop(worker)
                    workers.remove(worker)
    finally:
        for worker in workers:
            _stop(worker)


def _start(cases: Sequence[Case], mode: str, seconds: float, others: Sequence[_Worker]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    inherited = [ours, *(worker.pipe for worker in others)]
    process = context.Process(target=_work, args=(cases, mode, seconds, theirs, inherited), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, number: int) -> None:
    worker.case, worker.since = number, time.monotonic()
    with suppress(OSError):  # it died in between: the next look at it says so
        worker.pipe.send(number)


def _record(worker: _Worker, seconds: float) -> dict[str, Any] | None:
    """What came of its test, None while it runs. A process that is over its time is killed."""
    try:
        if worker.pipe.poll():
            record: dict[str, Any] = worker.pipe.recv()
            return record
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode
        if code == -signal.SIGXCPU:
            return _too_slow(worker, f"it took over {seconds:g} seconds of processor time")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"outcome": "crashed", "kind": name, "reason": f"the process ended with {name}"}
    if time.monotonic() - worker.since < seconds * _LONGER:
        return None
    worker.process.kill()
    worker.process.join()
    return _too_slow(worker, f"it was not done after {seconds * _LONGER:g} seconds")


def _too_slow(worker: _Worker, reason: str) -> dict[str, Any]:
    worker.done = 0  # whatever ran before: not to be run again
    return {"outcome": "crashed", "kind": "time", "reason": reason}


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _work(cases: Sequence[Case], mode: str, seconds: float, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """The process: numbers of tests come in, records go out; it ends when the other side does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:
        other.close()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ.update(OMP_NUM_THREADS="1", TVM_NUM_THREADS="1")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)  # native libraries print
    from graphopt.tools.conforming.one_test import run_case

    with suppress(EOFError, OSError):
        while True:
            number = pipe.recv()
            used = math.ceil(time.process_time() + seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (used, resource.RLIM_INFINITY))
            pipe.send(run_case(cases[number], mode))
