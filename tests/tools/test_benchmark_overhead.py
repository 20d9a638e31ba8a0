"""The overhead suite: the difference that it tells, and both of its cases from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphopt.tools.benchmarking import overhead
from tests.tools.conftest import Cli


def side(name: str, seconds: float, error: float = 0.0) -> dict[str, Any]:
    return {"side": name, "median": seconds, "valid": True, "about": {}, "error": error}


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": rows, "failures": [{"side": "kernel", "reason": "no memory"}], "interference": {}}


def test_overhead_is_the_call_less_the_kernel() -> None:
    model = overhead.judge(report(side("graphopt", 25e-6), side("kernel", 2e-6), side("onnxruntime", 8e-6, 1e-6)))
    assert model["overhead"] == pytest.approx(23e-6) and overhead.is_right(model)
    text = overhead.format_model({"title": "small", **model})
    assert "23.00" in text and "wanted at most 30 us: reached" in text
    slow = overhead.judge(report(side("graphopt", 33e-6), side("kernel", 2e-6)))
    assert "wanted at most 30 us: NOT REACHED" in overhead.format_model({"title": "small", **slow})
    wrong = overhead.judge(report(side("graphopt", 25e-6), side("kernel", 2e-6, 0.1)))
    assert not overhead.is_right(wrong)


def test_without_the_kernel_there_is_no_overhead() -> None:
    model = {"title": "small", **overhead.judge(report(side("graphopt", 25e-6)))}
    assert not overhead.is_right(model) and overhead.format_model(model) == "small: no memory"
    assert not overhead.is_right({"failed": "no memory"})


def test_the_suite_end_to_end(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    files = ["--json", "o.json", "--chart", "o.png", "--markdown", "o.md"]
    outcome = cli("benchmark", "--suite", "overhead", "--models", "dynamic", "--rounds", "1", "--threads", "1", *files)
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "o.json").read_text())["models"]
    assert [row["side"] for row in model["rows"]] == ["graphopt", "kernel", "onnxruntime"]
    assert not model["failures"] and model["overhead"] != 0
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "o.md").read_text()
    assert "| linear rows x 64, 1 row | graphopt | " in text and "medians of 1 turns of 0.2 s" in text
