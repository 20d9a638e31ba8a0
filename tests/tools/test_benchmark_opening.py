"""The opening suite: what it says of figures, what it refuses, and a real opening in a process of its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from graphopt.errors import RunError
from graphopt.tools.benchmarking import opening


def model(code: float, full: float, megabytes: float = 50.0) -> dict[str, Any]:
    figures = {opening.CODE: (code, megabytes), opening.FULL: (full, megabytes), opening.PEER: (0.5, 100.0)}
    rows = [{"side": side, "seconds": time, "bytes": 1e6 * size} for side, (time, size) in figures.items()]
    return {"title": "small", "rows": rows, "failures": []}


def test_what_was_wanted() -> None:
    text = opening.format_model(model(0.3, 0.5))
    assert text.count(": reached") == 2 and "NOT REACHED" not in text and " 0.60 " in text
    assert opening.format_model(model(0.31, 0.5)).count("NOT REACHED") == 1
    assert opening.format_model(model(0.31, 0.51)).count("NOT REACHED") == 2
    assert opening.format_model(model(0.1, 0.1, 101.0)).count("NOT REACHED") == 2
    assert opening.is_right(model(9, 9)) and not opening.is_right({"failed": "no memory"})
    assert not opening.is_right({**model(9, 9), "failures": ["onnxruntime cannot have this model"]})


def test_an_artifact_is_opened(artifact: str) -> None:
    cores = sorted(os.sched_getaffinity(0))[:1]
    code = opening._OURS.format(path=artifact, verify="code", cores=cores, threads=1)
    (row,) = opening.measure({"ours": code}, rounds=1)["rows"]
    assert 0 < row["seconds"] < 60 and row["bytes"] > 10 << 20


@pytest.mark.parametrize(
    ("code", "words"),
    [("import sys, os; sys.exit('no such file')", "no such file"), ("import sys, os, torch", "imported torch")],
)
def test_a_side_that_fails(code: str, words: str) -> None:
    with pytest.raises(RunError, match=words):
        opening.open_once(code)
