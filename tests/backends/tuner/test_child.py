"""A child that answers, and one that crashes, hangs or eats memory: that costs one request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.backends.tuner import child as children
from graphopt.backends.tuner.child import Child, ChildError

ROOT = Path(__file__).parents[3]
FUNCTIONS = "tests.backends.tuner.child_functions"
MEMORY = 1 << 30
PATIENCE = 120.0  # seconds: a machine that others use is slow


def child(name: str, memory: int = MEMORY) -> Child:
    return Child(f"{FUNCTIONS}:{name}", memory)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_one_child_answers_again_and_again() -> None:
    blob = os.urandom(1 << 20)
    with child("echo") as echo:
        value, blobs = echo.ask({"a": [1, None]}, [b"first", memoryview(blob)], PATIENCE)
        assert value[0] == {"a": [1, None]} and [bytes(each) for each in blobs] == [blob, b"first"]
        assert echo.ask(1, [], PATIENCE)[0] == [1, value[1]]
    assert is_gone(value[1])


def test_a_crash_tells_the_signal_and_the_last_words() -> None:
    with child("crash") as crash:
        for _ in range(2):  # with a new process each time
            with pytest.raises(ChildError, match="ended with signal SIGABRT: the last words"):
                crash.ask(None, [], PATIENCE)


def test_a_hang_is_ended_and_the_next_request_has_a_new_child() -> None:
    with child("hang") as hang:
        with pytest.raises(ChildError, match="it took over 1 s"):
            hang.ask(None, [], 1)
        hang._function = f"{FUNCTIONS}:echo"
        assert hang.ask(2, [], PATIENCE)[0][0] == 2


def test_memory_is_limited() -> None:
    with child("eat") as eat:
        assert eat.ask(1 << 20, [], PATIENCE)[0] == 1 << 20
        with pytest.raises(ChildError, match="MemoryError"):
            eat.ask(MEMORY, [], PATIENCE)
        assert eat.ask(1 << 20, [], PATIENCE)[0] == 1 << 20


def test_an_exception_is_its_last_line() -> None:
    with child("refuse") as refuse, pytest.raises(ChildError, match=r"^ValueError: not 3$"):
        refuse.ask(3, [], PATIENCE)


def test_a_starved_child_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_computed", lambda process: 0.0)
    monkeypatch.setattr(children, "_STARVED", PATIENCE / 0.01)
    with child("echo") as echo:
        assert echo.ask(4, [], 0.01)[0][0] == 4


def test_an_interrupt_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the processes that it started."""
    told = tmp_path / "pids"

    def interrupted(*_: object) -> None:
        wait_until(lambda: told.exists() and len(told.read_text().split()) == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.backends.tuner.child.select.select", interrupted)
    with child("leave_a_child") as left, pytest.raises(KeyboardInterrupt):
        left.ask(str(told), [], PATIENCE)
    for process in map(int, told.read_text().split()):
        wait_until(lambda process=process: is_gone(process))  # type: ignore[misc]


ORPHAN = f"""
from graphopt.backends.tuner.child import Child
Child("{FUNCTIONS}:leave_a_child", 1 << 30).ask({{path!r}}, [], 3)
"""


@pytest.mark.slow
def test_a_child_whose_parent_was_killed_ends_by_itself(tmp_path: Path) -> None:
    told = tmp_path / "pids"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"import graphopt.backends.tuner.child as c; c._STARVED, c._GRACE = 1, 0\n{ORPHAN.format(path=str(told))}"
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        wait_until(lambda: told.exists() and len(told.read_text().split()) == 2)
        parent.kill()
        parent.wait()
        own, below = map(int, told.read_text().split())
        wait_until(lambda: is_gone(own))
        os.kill(below, signal.SIGKILL)  # what it had started is no part of this
    finally:
        parent.kill()
        parent.wait()
