from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.tools.conftest import TINY, Cli

CHAIN = "tests.tools.tiny_models:branching"


@pytest.fixture
def report(cli: Cli) -> str:
    """What -O2 did to a model with two linears of one input, a batch norm after a sum, and a copy."""
    assert cli("optimize", CHAIN, "-o", "out.pt2", "--json", "report.json").code == 0
    return "report.json"


def validator(cli: Cli, kind: str) -> Any:
    schema = cli("explain", "--schema").json
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator({**schema, "oneOf": [{"$ref": f"#/$defs/{kind}"}]})


def test_all_passes(cli: Cli, report: str) -> None:
    outcome = cli("explain", report)
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == "pass applied declined near miss rolled back slower"
    assert "no-op-removal 1 0 0 0 0" in lines
    assert any(line.startswith("merge-linears 1 applied linear linear (aten.linear.default), ") for line in lines)


def test_one_node_of_one_pass(cli: Cli, report: str) -> None:
    (answer,) = cli("explain", report, "--node", "linear_1", "--pass", "merge-linears", "--json").json
    assert (answer["pass_name"], answer["outcome"], answer["node"]) == ("merge-linears", "applied", "linear_1")


def test_a_near_miss_end_to_end(cli: Cli, report: str) -> None:
    node = "_native_batch_norm_legit_no_training"
    outcome = cli("explain", report, "--node", node, "--pass", "batch-norm-folding")
    words = "near miss  1 of 2 parts of the pattern are there: its input is add (aten.add.Tensor), neither"
    assert outcome.code == 0 and words in outcome.out


def test_a_pass_that_starts_elsewhere(cli: Cli, report: str) -> None:
    outcome = cli("explain", report, "--node", "add", "--pass", "merge-linears")
    assert "merge-linears starts at aten.linear.default; add is aten.add.Tensor" in outcome.out


def test_reports_are_as_the_schema_says(cli: Cli, report: str) -> None:
    validator(cli, "optimize").validate(json.loads(Path(report).read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator(cli, "artifact").validate(json.loads(Path(report).read_text()))


def test_an_artifact(cli: Cli) -> None:
    assert cli("compile", TINY, "-o", "m.gopt", "--json", "compiled.json").code == 0
    outcome = cli("explain", "m.gopt", "--node", "linear")
    assert outcome.code == 0 and "no other linear reads the same input" in outcome.out
    from graphopt.tools.explain import read_report

    validator(cli, "artifact").validate(read_report("m.gopt"))
    validator(cli, "optimize").validate(read_report("compiled.json"))
    assert "no other linear" in cli("explain", "compiled.json").out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "REPORT is missing"),
        (("no.json",), "no.json: No such file"),
        (("text.json",), "text.json is no JSON"),
        (("other.json",), "format None"),
        (("out.pt2",), "is a model, not an artifact"),
        (("report.json", "--node", "linaer"), "did you mean 'linear'"),
        (("report.json", "--pass", "merge"), "did you mean 'merge-linears'"),
        (("report.json", "--json", "report.json"), "would overwrite the input"),
    ],
)
def test_what_cannot_be_explained(cli: Cli, report: str, words: tuple[str, ...], expected: str) -> None:
    Path("text.json").write_text("{")
    Path("other.json").write_text("{}")
    cli("explain", *words).refused(expected)
