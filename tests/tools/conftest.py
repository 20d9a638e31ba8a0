"""The command line called in this process, on a tiny model that is compiled once."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.tools.command_line import main

ROOT = Path(__file__).parents[2]
TINY = "tests.tools.tiny_models:dense"
DYNAMIC = "x:0=rows:1..64"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, *words: str, code: int = 2) -> None:
        """One line on stderr with these words, nothing on stdout."""
        assert (self.code, self.out) == (code, "")
        assert self.err.startswith("graphopt: error: ") and self.err.count("\n") == 1, self.err
        assert not [word for word in words if word not in self.err], self.err


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """cli("run", path, "--check") -> Outcome; the current folder is empty, and must hold no rubbish afterwards."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """relu(x @ w + b) with x float32 [rows, 8], rows from 1 to 64."""
    from graphopt.tools.model_argument import capture_model

    path = str(tmp_path_factory.mktemp("artifact") / "dense.gopt")
    graphopt.compile(capture_model(TINY, Namespace(dynamic=[DYNAMIC], examples=None))).save(path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[..., Path]:
    """inputs(x=array) -> path of an .npz."""

    def write(**arrays: Any) -> Path:
        path = tmp_path / "inputs.npz"
        np.savez(path, **arrays)
        return path

    return write
