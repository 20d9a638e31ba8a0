"""How far long work has come, told to whoever listens: nobody, unless a block is run with a listener."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]  # stage, steps done, steps in all


def _nobody(stage: str, done: int, total: int) -> None:
    return None


_listener: ContextVar[Listener] = ContextVar("listener", default=_nobody)


def tell(stage: str, done: int, total: int) -> None:
    """Say that `stage` has done so many of its steps."""
    _listener.get()(stage, done, total)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Run the block with `listener` being told."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
