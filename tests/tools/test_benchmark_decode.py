"""The decode suite: what it makes of figures, and one small decoder through all of it, beside ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphopt.tools.benchmarking import decode
from graphopt.tools.benchmarking.llama import Shape
from graphopt.tools.benchmarking.turns import Measurement
from tests.tools.conftest import Cli

SHAPE = Shape(layers=1, width=128, heads=2, groups=1, hidden=128, vocabulary=64, length=96, tied=True)


def measurement(side: str, seconds: float, **about: Any) -> Measurement:
    return Measurement(side, about, 0.1, 1 << 20, [], [seconds] * 3, [seconds] * 3)


def test_shares_of_the_roofline_and_of_the_memory_asked_for() -> None:
    memory = {
        "growth_bytes": 300 << 20,
        "packed_bytes": 200 << 20,
        "touched_bytes": 160 << 20,
        "tokens": [1, 2, 3],
        "error": 0.0,
    }
    ours = measurement("decoder", 0.02, **memory)
    found = decode.judge(ours, measurement("read", 0.05, bytes=500 << 20), [], SHAPE)
    assert found["share_of_roofline"] == pytest.approx(160 / 10_000 / 0.02)
    assert found["tokens_per_second"] == 50
    assert found["growth_allowed"] == pytest.approx(1.1 * (200 << 20) + 2 * 96 * 64 * 4 + (32 << 20))
    assert found["valid"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "W4"])
def test_a_small_decoder(form: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(decode, "SHAPE", SHAPE)
    files = "--json", "o.json", "--markdown", "o.md", "--chart", "o.png"
    outcome = cli("benchmark", "--suite", "decode", "--models", form, "--rounds", "2", "--threads", "1", *files)
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "o.json").read_text())["models"]
    assert model["error"] < 1e-5 and model["peer_distance"] < (1e-4 if form == "float32" else 0.05)
    assert model["same_tokens"] == 64 or form == "W4"
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {form} |" in (tmp_path / "o.md").read_text()
    assert "tokens/s" in outcome.out
