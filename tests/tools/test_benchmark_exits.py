"""The exits suite: one small network through all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.tools.benchmarking import exits_cases
from graphopt.tools.benchmarking.exits_cases import ExitCase, ExitSubject
from tests.passes.exit_models import inputs, labelled, network
from tests.tools.conftest import Cli

PNG = b"\x89PNG\r\n\x1a\n"


def subject(seed: int) -> ExitSubject:
    one = [{"x": inputs(1, seed)} for seed in range(6)]
    return ExitSubject(network(None), network(1), labelled(), "accuracy", one, [{"x": inputs(8, 9)}])


@pytest.mark.slow
def test_the_suite_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ExitCase("blocks", subject, (0,), "fit-steps=20,exits=[0]", (0.7,), "accuracy")
    monkeypatch.setitem(exits_cases.CASES, "blocks", case)
    words = ["--models", "blocks", "--rounds", "3", "--threads", "1"]
    outcome = cli("benchmark", "--suite", "exits", *words, "--json", "e.json", "--chart", "e.png", "--markdown", "e.md")
    assert outcome.code == 0, outcome.err
    (model,) = json.loads((tmp_path / "e.json").read_text())["models"]
    (point,) = model["points"]
    assert point["differ"] <= point["close"] and 0 < point["cost"] < 1.1 and sum(point["shares"]) == pytest.approx(1)
    assert model["first_stage"]["alone_ms"] > 0 and point["one_ratio"] > 0 and point["many_ratio"] > 0
    assert (tmp_path / "e.png").read_bytes().startswith(PNG)
    assert "| blocks | 0 | 0.7 |" in (tmp_path / "e.md").read_text()
    assert "always leaving at exit 0" in outcome.out
