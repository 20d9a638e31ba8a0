"""Writers in processes of their own, light ones: `python -m tests.backends.tuner.processes MODE FOLDER ...`."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.backends.tuner.store import Store
from graphopt.errors import WriteError
from tests.backends.tuner.records import make_record

ROOT = Path(__file__).parents[3]


def start(mode: str, *words: object) -> subprocess.Popen[str]:
    """A process in one of the modes below."""
    command = [sys.executable, "-m", "tests.backends.tuner.processes", mode, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def write(folder: str, writer: str, count: str) -> None:
    """Append records, and print the number of each when it is committed."""
    store = Store(folder)
    for number in range(int(count)):
        store.append(make_record(writer=writer, number=number))
        print(number, flush=True)


def limited(folder: str, size: str) -> None:
    """Append until the file reaches a size that the kernel lets no write pass, then print how many were committed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    store, number = Store(folder), 0
    try:
        while True:
            store.append(make_record(number=number))
            number += 1
    except WriteError as e:
        print(number, e)


def killed_in_append(folder: str) -> None:
    """For every byte of a line: a child that dies after it, then a writer that is not killed."""
    os.fsync = lambda fd: None  # the kernel keeps what a killed process wrote
    store = Store(folder)
    for size in range(len(make_record(killed=0).to_line()) + 1):
        in_child(partial(store.append, make_record(killed=0)), die_after_bytes(size))
        store.append(make_record(whole=size))


def killed_in_prune(folder: str) -> None:
    """For every step of rewriting the file that the kernel knows of: a child that dies before it. Prints how many."""
    store, step = Store(folder), 0
    while in_child(store.prune, die_before_step(step)) == signal.SIGKILL:
        step += 1
        store.append(make_record(whole=step))
    print(step)


def in_child(work: Callable[[], Any], prepare: Callable[[], None]) -> int:
    """The exit status of a fork that does it."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die_after_bytes(size: int) -> Callable[[], None]:
    """os.write writes `size` bytes in all and dies."""
    write = os.write

    def write_some(handle: int, content: bytes) -> None:
        write(handle, content[:size])
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: setattr(os, "write", write_some)


def die_before_step(step: int) -> Callable[[], None]:
    """The call number `step` of these functions is not made."""
    left = [step]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments)

        return call

    def prepare() -> None:
        for name in ("open", "fchmod", "fsync", "replace", "close"):
            setattr(os, name, dying(getattr(os, name)))

    return prepare


if __name__ == "__main__":
    {function.__name__: function for function in (write, limited, killed_in_append, killed_in_prune)}[sys.argv[1]](
        *sys.argv[2:]
    )
