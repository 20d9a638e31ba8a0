"""The gemv suite: the numbers that all sides multiply, what is wanted of times, one small case through all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.tools.benchmarking import gemv, gemv_cases
from graphopt.tools.benchmarking.gemv_cases import GRIDS, GemvCase
from tests.tools.conftest import Cli


def run_onnxruntime(path: Path, x: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    return np.asarray(result)


@pytest.mark.parametrize("grid", ["w4", "w2", "w1.58"])
def test_both_sides_multiply_the_same_numbers(grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = GemvCase("small", GRIDS[grid], 384, 256, streaming=True)
    monkeypatch.setattr(gemv_cases, "STREAMED", 2 * case.layer_bytes)
    assert case.layers == 2
    program = case.program()
    (x,) = program.examples
    case.write_onnx(tmp_path / "gemv.onnx")
    wanted = program(x)[0].numpy()
    found = run_onnxruntime(tmp_path / "gemv.onnx", x.numpy())
    assert np.abs(found - wanted).max() < gemv.AGREE * np.abs(wanted).max() and 0.3 < wanted.std() < 3


@pytest.mark.slow
def test_the_suite_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    small = GemvCase("small", GRIDS["w2"], 256, 256, streaming=True)
    monkeypatch.setitem(gemv_cases.CASES, "small", small)
    for module in (gemv, gemv_cases):
        monkeypatch.setattr(module, "STREAMED", 1 << 16)
    files = ["--json", "g.json", "--chart", "g.png", "--markdown", "g.md"]
    outcome = cli("benchmark", "--suite", "gemv", "--models", "small", "--rounds", "2", "--threads", "1", *files)
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "g.json").read_text())["models"]
    assert [row["side"] for row in model["rows"]] == ["graphopt", "onnxruntime", "onnxruntime-lut", "reads"]
    assert model["bytes_per_second"] > 0 and model["share_of_reading"] > 0 and not model["failures"]
    assert "wanted 1x of ONNX Runtime with 2 bits and 85% of reading" in outcome.out
    text = (tmp_path / "g.md").read_text()
    assert "| small | graphopt | " in text and "turns of 0.2 s" in text


def model(speedup: float, share: float | None, error: float = 0.0) -> dict[str, Any]:
    case = {"wanted": 1.8}
    return {"speedup": speedup, "share_of_reading": share, "case": case, "errors": {"graphopt": error}}


def test_what_is_wanted() -> None:
    assert gemv.reaches(model(1.8, None)) and gemv.reaches(model(1.8, 0.85))
    assert not gemv.reaches(model(1.79, None)) and not gemv.reaches(model(2.0, 0.84))
    assert gemv.is_right(model(0.1, 0.1)) and not gemv.is_right(model(9.0, 1.0, 0.06))
    assert not gemv.is_right({"failed": "no memory"})
