"""Every verb that takes MODEL takes an `.onnx`, a good one and a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.capture.onnx.tiny import model_of
from tests.tools.conftest import Cli

VERBS: dict[str, tuple[str, ...]] = {
    "inspect": (),
    "optimize": ("-o", "out.onnx"),
    "run-pass": ("-o", "out.onnx"),
    "compile": ("-o", "out.gopt"),
    "compare": ("m.onnx",),
    "benchmark": ("--rounds", "1", "--threads", "1"),
}


@pytest.fixture
def good(tmp_path: Path) -> str:
    """relu(tokens @ w), tokens float32 [rows, 4]."""
    nodes = [helper.make_node("MatMul", ["tokens", "w"], ["a"]), helper.make_node("Relu", ["a"], ["scores.0"])]
    weights = {"w": np.arange(24, dtype=np.float32).reshape(4, 6)}
    model = model_of(nodes, {"tokens": ("float32", ("rows", 4))}, ["scores.0"], weights)
    model.doc_string = "Ranks passages.\nUnder a licence."
    for key, value in (("author", "ann"), ("graphopt.rules", "{}"), ("pkg.torch.export", "/home/ann/model.py")):
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, tmp_path / "m.onnx")
    return "m.onnx"


def words_of(verb: str, model: str) -> tuple[str, ...]:
    return (verb, *(("dead-code",) if verb == "run-pass" else ()), model, *VERBS[verb])


@pytest.mark.parametrize("verb", ["inspect", "optimize", "run-pass", "compile", "compare"])
def test_a_good_file(cli: Cli, good: str, verb: str) -> None:
    outcome = cli(*words_of(verb, good), "--dynamic", "tokens:0=count:1..64", "--json", "report.json")
    assert outcome.code == 0, outcome.err
    assert json.loads(Path("report.json").read_text())


@pytest.mark.slow
def test_benchmark_of_a_file(cli: Cli, good: str) -> None:
    outcome = cli(*words_of("benchmark", good), "--shape", "tokens:5x4", "--json")
    assert outcome.code == 0 and [row["side"] for row in outcome.json["rows"]] == ["graphopt"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no graph"), (b"\xff" * 40, "m.onnx is no ONNX model"), (None, "m.onnx does not exist")],
)
def test_a_bad_file(cli: Cli, tmp_path: Path, verb: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    cli(*words_of(verb, "m.onnx")).refused(words)
    assert not (tmp_path / "out.onnx").exists() and not (tmp_path / "out.gopt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dynamic", "toks:0=rows"), ("unknown input 'toks'", "'tokens'")),
        (("--dynamic", "tokens:1=width"), ("tokens", "axis 1")),
        (("--shape", "tokens:5x5"), ("axis 1 of tokens is fixed at 4",)),
        (("--shape", "scores:5x4"), ("unknown input 'scores'",)),
        (("--size", "row=5"), ("unknown size 'row'", "'rows'")),
    ],
)
def test_options_that_do_not_fit_the_file(
    cli: Cli, good: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    cli("compare", good, good, *options).refused(*words)


def test_shapes_and_names_of_sizes(cli: Cli, good: str) -> None:
    assert cli("compare", good, good, "--shape", "tokens:7x4").code == 0
    report = cli("inspect", good, "--dynamic", "tokens:0=count:1..64", "--json").json
    assert report["inputs"][0]["shape"] == ["count", 4] and report["sizes"] == {"count": {"low": 1, "high": 64}}


def test_what_the_file_says_of_itself_survives(cli: Cli, good: str) -> None:
    """Names, sizes, description and metadata; what exporters note of their machine does not."""
    assert cli("optimize", good, "-o", "through.pt2").code == 0
    for first, second in ((good, "once.onnx"), ("once.onnx", "twice.onnx"), ("through.pt2", "thrice.onnx")):
        assert cli("optimize", first, "-o", second).code == 0
        model = onnx.load(second)
        assert model.doc_string == "Ranks passages.\nUnder a licence."
        assert {entry.key: entry.value for entry in model.metadata_props}.get("author") == "ann"
        assert "pkg.torch.export" not in {entry.key for entry in model.metadata_props}
        (taken,), (made,) = model.graph.input, model.graph.output
        shapes = [[size.dim_param or size.dim_value for size in v.type.tensor_type.shape.dim] for v in (taken, made)]
        assert (taken.name, made.name, shapes) == ("tokens", "scores.0", [["rows", 4], ["rows", 6]])
        onnx.checker.check_model(model, full_check=True)
    assert cli("compare", good, "twice.onnx", "--size", "rows=7").code == 0


def test_models_that_differ(cli: Cli, good: str, tmp_path: Path) -> None:
    model = onnx.load(tmp_path / good)
    model.graph.initializer[0].raw_data = bytes(96)
    onnx.save(model, tmp_path / "other.onnx")
    assert cli("compare", good, "other.onnx").code == 1


def test_explain_takes_what_optimize_said_of_a_file(cli: Cli, good: str) -> None:
    assert cli("optimize", good, "-o", "out.onnx", "--json", "report.json").code == 0
    assert cli("explain", "report.json").code == 0
    cli("explain", good).refused("is a model, not an artifact")
