"""What `Child` runs in its tests; imported by the child, which has no torch."""

from __future__ import annotations

import os
import sys
from typing import Any

from graphopt.backends.tuner.child import Blob


def echo(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    print("what is printed is no answer")
    return [value, os.getpid()], blobs[::-1]


def crash(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    os.abort()


def hang(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    while True:
        pass


def eat(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    return len(bytearray(value)), []


def refuse(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    raise ValueError(f"first line\nnot {value}")


def leave_a_child(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    """Starts a process that outlives everything, says so, and hangs."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(value, "w") as stream:
        stream.write(f"{os.getpid()} {child.pid}")
    return hang(value, blobs)
