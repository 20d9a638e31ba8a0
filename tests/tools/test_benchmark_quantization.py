"""The quantization suite: what it makes of figures, and one small network through all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.tools.benchmarking import quantization, quantization_cases
from graphopt.tools.benchmarking.quantization_cases import QuantizationCase
from tests.tools.conftest import Cli
from tests.tools.test_benchmark_folding import PNG, subject


def test_the_suite_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = QuantizationCase("stack", subject, "O2,quantize,qdq-fusion", {"cosine": 0.99})
    monkeypatch.setitem(quantization_cases.CASES, "stack", case)
    files = ["--json", "f.json", "--chart", "f.png", "--markdown", "f.md"]
    outcome = cli(
        "benchmark", "--suite", "quantization", "--models", "stack", "--rounds", "3", "--threads", "1", *files
    )
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "f.json").read_text())["models"]
    floats, quantized = model["rows"]
    assert floats["figures"] == pytest.approx({"cosine": 1.0, "spearman": 1.0})
    assert 0.99 < quantized["figures"]["cosine"] < 1
    assert quantized["bytes"] < floats["bytes"] and quantized["milliseconds"] > 0
    assert (tmp_path / "f.png").read_bytes().startswith(PNG)
    assert "| stack | quantized | 0.99" in (tmp_path / "f.md").read_text()
    assert "cosine at least 0.99: reached" in outcome.out


def model(**figures: float) -> dict[str, object]:
    rows = [{"form": form, "passes": "O2", "figures": figures} for form in quantization.FORMS]
    return {"rows": rows, "least": {"accuracy": 0.9}}


def test_every_figure_is_to_be_reached() -> None:
    assert quantization.is_right(model(accuracy=0.9))
    assert not quantization.is_right(model(accuracy=0.899))
    assert not quantization.is_right({"failed": "no MiniLM"})


def test_a_fall_is_counted_from_the_float32_network() -> None:
    case = QuantizationCase("stack", subject, "O2", {"accuracy": 0.005}, falls=True)
    assert quantization.least(case, {"accuracy": 0.95}) == pytest.approx({"accuracy": 0.945})
