from __future__ import annotations

import io
import threading

import pytest

from graphopt.progress import tell
from graphopt.tools import progress


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_long_work_shows_a_line_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.001)
    with progress.progress("compiling"):
        assert terminal.written.wait(30)
    assert "compiling ..." in terminal.getvalue() and terminal.getvalue().endswith("\r\033[K")


def test_the_stage_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.001)
    with progress.progress("running O2"):
        tell("constant-folding", 1, 7)
        for _ in range(2):  # the first write may have begun before the stage was told
            terminal.written.clear()
            assert terminal.written.wait(30)
    assert "running O2: constant-folding (2 of 7) ..." in terminal.getvalue()


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 1e6)
    with progress.progress("compiling"):
        pass
    assert terminal.getvalue() == ""


def test_nothing_outside_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.progress("compiling"):
        pass
    assert capsys.readouterr().err == ""
