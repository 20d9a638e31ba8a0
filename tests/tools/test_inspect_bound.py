"""What `inspect` says of bound inputs and of sizes that a model fixes, and how warnings are printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.capture.onnx.test_binding import noted, top_k
from tests.capture.onnx.test_fixed_sizes import positions_cut, reshape
from tests.tools.conftest import Cli


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    onnx.save(noted('{"k": [2]}'), tmp_path / "counted.onnx")
    return tmp_path / "counted.onnx"


def test_bound_inputs_of_models_and_artifacts(cli: Cli, counted: Path, tmp_path: Path) -> None:
    assert "k     int64    1      any     2" in cli("inspect", counted).out
    assert [spec.get("bound") for spec in cli("inspect", counted, "--json").json["inputs"]] == [None, [2]]
    assert cli("compile", counted, "-o", tmp_path / "m.gopt").code == 0
    text = cli("inspect", tmp_path / "m.gopt").out
    assert "bound to" in text and "k     int64    1      2\n" in text
    np.savez(tmp_path / "feed.npz", x=np.ones((3, 4), np.float32), k=np.array([3]))
    refused = cli("run", tmp_path / "m.gopt", "--input", tmp_path / "feed.npz", "-o", tmp_path / "y.npz")
    refused.refused("'k' is bound to [2], got [3]")


def test_optimize_says_what_limits_a_size(cli: Cli, tmp_path: Path) -> None:
    onnx.save(positions_cut(), tmp_path / "m.onnx")
    outcome = cli("optimize", tmp_path / "m.onnx", "-O0", "-o", tmp_path / "m.pt2")
    assert "note   size 'seq' is at most 16: ONNX node Slice 'cut' needs that\n" in outcome.out


def test_nothing_of_it_where_nothing_is_bound(cli: Cli, artifact: str) -> None:
    assert "bound" not in cli("inspect", artifact).out


def test_an_input_that_could_be_bound(cli: Cli, tmp_path: Path) -> None:
    onnx.save(top_k(), tmp_path / "m.onnx")
    assert "give example_inputs with it, it will be bound" in cli("inspect", tmp_path / "m.onnx").err
    np.savez(tmp_path / "feed.npz", x=np.ones((3, 4), np.float32), k=np.array([2]))
    examples = ("--examples", tmp_path / "feed.npz")
    assert "k     int64    1      any     2" in cli("inspect", tmp_path / "m.onnx", *examples).out
    assert cli("optimize", tmp_path / "m.onnx", "-O1", "-o", tmp_path / "m.pt2", *examples).code == 0
    assert "k     int64    1      any     2" in cli("inspect", tmp_path / "m.pt2").out
    cli("inspect", "tests.tools.tiny_models:dense", *examples).refused("leave out --examples")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_and_stays_as_a_note(cli: Cli, tmp_path: Path) -> None:
    onnx.save(reshape(-1, 16, 2, 4), tmp_path / "m.onnx")
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 0 and outcome.err.startswith("graphopt: warning: axis 1 of input 'x' (seq) is 16 and")
    assert outcome.err.count("\n") == 1 and "\nnotes\n  axis 1 of input 'x' (seq) is 16 and" in outcome.out
    (note,) = cli("inspect", tmp_path / "m.onnx", "--json").json["notes"]
    assert note in outcome.out
    onnx.save(reshape(0, 0, 2, 4), tmp_path / "open.onnx")
    outcome = cli("inspect", tmp_path / "open.onnx")
    assert outcome.err == "" and "notes" not in outcome.out
