"""The gating suite: what it makes of its figures, and small networks through all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.tools.benchmarking import gating, gating_cases
from graphopt.tools.benchmarking.gating_cases import GatingCase, digits, kernel, resnet
from tests.tools.conftest import Cli

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_suite_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        gating_cases.CASES, "small", GatingCase("small", "one kernel", 1e6, [lambda: kernel(32, 32, 6, 3, 1)])
    )
    words = ["--models", "small", "--rounds", "3", "--threads", "1"]
    files = ["--json", "g.json", "--chart", "g.png", "--markdown", "g.md"]
    outcome = cli("benchmark", "--suite", "gating", *words, *files)
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "g.json").read_text())["models"]
    (row,) = model["rows"]
    assert row["label"] == "32->32 6x6 3x3/1" and min(row["ungated"], row["gated"], row["ratio"]) > 0
    assert model["ratio"] == row["ratio"]
    assert (tmp_path / "g.png").read_bytes().startswith(PNG)
    assert "| small | 32->32 6x6 3x3/1 |" in (tmp_path / "g.md").read_text()
    assert "wanted: at most 1e+06" in outcome.out


def test_every_kernel_has_to_be_as_fast_as_is_wanted_and_networks_on_the_mean() -> None:
    rows = [{"ratio": 0.9}, {"ratio": 1.2}]
    model = {"name": "digits-cnn", "wanted": 1.05, "rows": rows, "ratio": 1.05}
    assert gating.is_right(model)
    assert not gating.is_right({**model, "name": "kernels"})
    assert not gating.is_right({"name": "kernels", "failed": "no compiler"})


@pytest.mark.slow
def test_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each block's channels, and the first share of blocks that costs little."""
    sides = resnet((32, 32, 64, 64))
    gated = [str(node.target) for node in sides.gated.nodes() if "gated_convolution" in str(node.target)]
    assert len(gated) == 2 * 8
    monkeypatch.setattr(gating_cases, "FIT_STEPS", 40)
    monkeypatch.setattr(gating_cases, "KEEPS", (0.1, 1.0))
    found = digits(0, (32, 64), 8, 60)
    assert found.figures["kept"] in (0.1, 1.0)
    assert len(found.inputs) == gating_cases.TIMED
