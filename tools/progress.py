"""A line on the terminal that says what takes so long; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from graphopt.progress import told_to

DELAY = 1.0  # seconds: shorter work says nothing


@contextlib.contextmanager
def progress(label: str) -> Iterator[None]:
    """Shows `label`, the stage the work has come to and the seconds spent on stderr.

    Only if that is a terminal, and the block runs longer than DELAY.
    """
    if not sys.stderr.isatty():
        yield
        return
    line = Line(label)
    thread = threading.Thread(target=line.show, daemon=True)
    thread.start()
    try:
        with told_to(line.hear):
            yield
    finally:
        line.done.set()
        thread.join()


class Line:
    """One line of a terminal, written again every DELAY seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.stage = ""
        self.done = threading.Event()

    def hear(self, stage: str, done: int, total: int) -> None:
        self.stage = f": {stage}" + (f" ({done + 1} of {total})" if total > 1 else "")

    def show(self) -> None:
        begin = time.monotonic()
        while not self.done.wait(DELAY):
            sys.stderr.write(f"\r\033[K{self.label}{self.stage} ... {time.monotonic() - begin:.0f} s ")
            sys.stderr.flush()
        if time.monotonic() - begin > DELAY:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
