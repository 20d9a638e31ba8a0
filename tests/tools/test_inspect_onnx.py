from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from tests.capture.onnx.tiny import model_of
from tests.tools.conftest import Cli


@pytest.fixture
def strange(tmp_path: Path) -> str:
    """Two operators that nobody imports, one of them twice, beside one that is."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Sparkle", ["a"], ["b"], name="first", domain="com.example"),
        helper.make_node("Sparkle", ["b"], ["c"], name="second", domain="com.example"),
        helper.make_node("Hardmax", ["c"], ["r"]),
    ]
    model = model_of(nodes, {"x": ("float32", ("n", 4))}, ["r"])
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    onnx.save(model, tmp_path / "strange.onnx")
    return str(tmp_path / "strange.onnx")


def test_a_file_that_cannot_be_imported_is_shown_with_all_that_is_missing(cli: Cli, strange: str) -> None:
    outcome = cli("inspect", strange)
    assert outcome.code == 2
    for words in ("opsets onnx 20, com.example 3", "x     float  n x 4", "Hardmax", "com.example.Sparkle      2"):
        assert words in " ".join(outcome.out.splitlines()), words
    assert "Relu" not in outcome.out and "com.example.Sparkle (first, second)" in outcome.err


def test_the_same_as_json(cli: Cli, strange: str) -> None:
    report = cli("inspect", strange, "--json").json
    missing = {row["operator"]: row["nodes"] for row in report["file"]["operators"] if not row["imported"]}
    assert missing == {"com.example.Sparkle": 2, "Hardmax": 1} and "Hardmax" in report["error"]


def test_a_file_that_is_imported_shows_the_program_too(cli: Cli, tmp_path: Path) -> None:
    onnx.save(
        model_of([helper.make_node("Relu", ["x"], ["r"])], {"x": ("float32", ("n", 4))}, ["r"]), tmp_path / "m.onnx"
    )
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 0 and "opsets onnx 20" in outcome.out and "aten.relu.default" in outcome.out
    assert "not imported" not in outcome.out


def test_a_damaged_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 40)
    cli("inspect", tmp_path / "m.onnx").refused("m.onnx is no ONNX model, or is damaged")
