from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import UsageError
from graphopt.runtime import InferenceSession, threads
from graphopt.runtime.library import ffi
from graphopt.runtime.threads import Runner, resolve

W, B = np.arange(8, dtype=np.float32), np.ones(8, np.float32)
CPUS = len(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(CPUS < 2, reason="needs two CPUs")


def pool_size() -> int:
    return int(ffi().get_global_func("runtime.NumThreads")())


def in_new_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def test_threads_are_bounded_by_the_affinity_mask() -> None:
    assert resolve(None) == CPUS
    assert resolve(1) == 1
    for wrong in (0, -1, CPUS + 1):
        with pytest.raises(UsageError, match=f"threads is {wrong} and this process may use {CPUS} CPUs; give 1 to"):
            resolve(wrong)
    for odd in (True, 1.0, "2"):
        with pytest.raises(UsageError, match="give a whole number from 1 to"):
            resolve(odd)  # type: ignore[arg-type]


def test_the_mask_counts_not_the_machine() -> None:
    def narrowed() -> int:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        return resolve(None)

    assert in_new_thread(narrowed) == 1


@needs_two
def test_a_pool_has_the_threads_asked_for_and_leaves_the_affinity() -> None:
    def check() -> tuple[int, int, int, bool]:
        mask = os.sched_getaffinity(0)
        two, one = Runner(2), Runner(1)
        sizes = two.run(pool_size), one.run(pool_size), two.run(pool_size)
        return (*sizes, os.sched_getaffinity(0) == mask)

    assert in_new_thread(check) == (2, 1, 2, True)


@needs_two
def test_a_session_with_more_threads_than_the_pool_runs_elsewhere() -> None:
    def check() -> tuple[bool, int, bool]:
        here = threading.get_ident()
        one, two = Runner(1), Runner(2)
        stayed = one.run(threading.get_ident) == here
        return stayed, two.run(pool_size), two.run(threading.get_ident) == here

    assert in_new_thread(check) == (True, 2, False)


@needs_two
def test_a_pool_that_tvm_made_itself_does_not_limit_a_session() -> None:
    def check() -> int:
        mask = os.sched_getaffinity(0)
        pool_size()  # makes TVM's own pool, and pins this thread
        os.sched_setaffinity(0, mask)
        return Runner(2).run(pool_size)

    assert in_new_thread(check) == 2


@needs_two
def test_workers_are_prepared_once_for_each_pool() -> None:
    def check() -> list[int]:
        calls: list[int] = []
        for runner in (Runner(2), Runner(1), Runner(2)):
            runner.run(runner.prepare_workers, calls.append)
        return calls

    assert [in_new_thread(check) for _ in range(2)] == [[2], [2]]


def test_errors_cross_from_the_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, configure = Runner(1), threads._configure
    here = threading.get_ident()
    monkeypatch.setattr(threads, "_configure", lambda count: threading.get_ident() != here and configure(count))
    monkeypatch.setattr(threads._pool, "used", 0)
    with pytest.raises(ZeroDivisionError):
        runner.run(lambda: 1 // 0)


def hammer(sessions: list[InferenceSession], rounds: int) -> None:
    """One thread a session given, each with inputs of its own; equal sessions take turns."""
    failures: list[str] = []
    start = threading.Barrier(len(sessions))

    def work(index: int) -> None:
        start.wait()
        for turn in range(rounds):
            x = np.full((1 + (index + turn) % 5, 8), index * rounds + turn, np.float32)
            (y,) = sessions[index].run(None, {"x": x})
            if not np.array_equal(y, x * W + B):
                failures.append(f"thread {index}, turn {turn}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(sessions))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_many_threads_on_one_session(artifact: Path) -> None:
    session = InferenceSession(artifact)
    hammer([session] * 4, 500)


def test_clones_in_threads_share_the_weights(artifact: Path) -> None:
    session = InferenceSession(artifact, threads=1)
    clones = [session.clone() for _ in range(3)]
    assert all(clone._model is session._model and clone.threads == 1 for clone in clones)
    hammer([session, *clones], 500)


def test_state_counts_every_call_of_every_thread(artifact: Path) -> None:
    session, one = InferenceSession(artifact), np.ones(8, np.float32)

    def work() -> None:
        for _ in range(200):
            session.run(None, {"x": one}, entry="count")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(session.run(None, {"x": one}, entry="count")[0], np.full(8, 601))


def test_after_an_interrupt_the_next_call_waits_for_the_one_still_running(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, configure, done = Runner(1), threads._configure, threading.Event()
    here = threading.get_ident()
    monkeypatch.setattr(threads, "_configure", lambda count: threading.get_ident() != here and configure(count))
    monkeypatch.setattr(threads._pool, "used", 0)

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        done.set()

    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupt)
    monkeypatch.undo()
    assert runner.run(done.is_set)  # on this thread
