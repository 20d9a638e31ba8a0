"""Ctrl-C, remembered: Python drops an exception that a signal handler raises inside a weakref or C callback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

AGAIN = 0.05  # seconds after which a lost interrupt is raised once more, outside the callback that lost it

_presses: list[int] = []
_unraisable = sys.unraisablehook


def install() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt until one gets through, and `pressed` knows of it."""
    sys.unraisablehook = _retry
    signal.signal(signal.SIGALRM, _note)
    signal.signal(signal.SIGINT, _note)


@contextmanager
def leaving() -> Iterator[None]:
    """Around imports that nothing could catch a KeyboardInterrupt from: Ctrl-C ends the process without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # only the main thread may set handlers
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        with suppress(ValueError):
            if signal.getsignal(signal.SIGINT) is _leave:
                signal.signal(signal.SIGINT, before)


def ignore() -> None:
    """The result stands: the rest is only the end of the process."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pressed() -> bool:
    """Whether Ctrl-C came, no matter what became of its exception."""
    return bool(_presses)


def check() -> None:
    """Before an output is committed: raises KeyboardInterrupt when Ctrl-C came."""
    if _presses:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> NoReturn:
    _presses.append(number)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.stderr.write("graphopt: interrupted\n")
    raise SystemExit(130)


def _retry(lost: sys.UnraisableHookArgs) -> None:
    if isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    else:
        _unraisable(lost)
