"""How many threads a session uses, and on which CPUs.

TVM keeps one pool of workers for every thread that calls it. On its own it takes half of the CPUs it sees, whatever
the process is allowed to use, and pins the caller to them. Here a pool has exactly the threads asked for, all of them
free to move on the CPUs that the calling thread may use, and the caller's own affinity is left as it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from graphopt.errors import UsageError
from graphopt.runtime.library import ffi

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_SHARE_ALL_CORES = -3


class _Pool(threading.local):
    """This thread's pool: the process that made it, its threads, how many are in use now, and how many are prepared."""

    process = 0
    capacity = 0
    used = 0
    prepared = 1  # the calling thread is no worker


_pool = _Pool()


def resolve(threads: int | None) -> int:
    """The number of threads to use; None is one for each CPU this process may use. Raises UsageError for others."""
    available = len(os.sched_getaffinity(0))
    if threads is None:
        return available
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise UsageError(f"threads is {threads!r}; give a whole number from 1 to {available}, or None for all")
    if not 1 <= threads <= available:
        raise UsageError(f"threads is {threads} and this process may use {available} CPUs; give 1 to {available}")
    return threads


class Runner:
    """Runs calls with a fixed number of threads, on the calling thread whenever its pool allows that.

    A pool cannot grow: where the calling thread already has a smaller one, or has lost it in a fork, calls move to a
    thread of the runner's own. One call at a time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._busy = threading.Lock()
        self._own: ThreadPoolExecutor | None = None
        self._process = 0

    def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call `function` with the pool set."""
        if (_pool.used == self.threads and _pool.process == os.getpid()) or _configure(self.threads):
            return self._alone(function, *arguments)
        if self._own is None or self._process != os.getpid():
            from concurrent.futures import ThreadPoolExecutor  # most sessions never need it

            self._own = ThreadPoolExecutor(1, "graphopt", _configure, (self.threads,))
            self._process = os.getpid()
        return self._own.submit(lambda: self._alone(function, *arguments)).result()

    def _alone(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """A caller that was interrupted may be gone while its call still runs; the next one waits for that."""
        with self._busy:
            return function(*arguments)

    def prepare_workers(self, prepare: Callable[[int], object]) -> None:
        """Inside `run`: `prepare` is called with the number of threads, unless it was for all of these workers."""
        if _pool.prepared < self.threads:
            prepare(self.threads)
            _pool.prepared = self.threads


def _configure(threads: int) -> bool:
    """Make the calling thread's pool have that many threads; False where it cannot."""
    if _pool.process not in (0, os.getpid()) and _pool.capacity > 1:
        return False  # the workers stayed in the parent process
    cpus = os.sched_getaffinity(0)
    names = [str(cpu) for cpu in sorted(cpus)]
    configure: Any = ffi().get_global_func("runtime.config_threadpool")
    try:
        if not _pool.capacity:
            # The pool is made here, with as many workers as this list has entries.
            configure(_SHARE_ALL_CORES, threads, (names * threads)[:threads])
            _pool.capacity = ffi().get_global_func("runtime.NumThreads")()
        _pool.process = os.getpid()
        if threads > _pool.capacity:
            return False
        if threads > 1:
            configure(_SHARE_ALL_CORES, threads, names)
        else:
            configure(_SHARE_ALL_CORES, 1, names[:1])
    finally:
        os.sched_setaffinity(0, cpus)
    _pool.used = threads
    return True
