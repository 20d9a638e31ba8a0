"""A line on the terminal that says what takes so long; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

DELAY = 1.0  # seconds: shorter work says nothing


@contextlib.contextmanager
def progress(label: str) -> Iterator[None]:
    """Shows `label` and the seconds spent on stderr, if that is a terminal and the block runs longer than DELAY."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=show, args=(label, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def show(label: str, done: threading.Event) -> None:
    begin = time.monotonic()
    while not done.wait(DELAY):
        sys.stderr.write(f"\r{label} ... {time.monotonic() - begin:.0f} s ")
        sys.stderr.flush()
    if time.monotonic() - begin > DELAY:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
