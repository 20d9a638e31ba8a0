from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tools.conftest import DYNAMIC, TINY, Cli


@pytest.mark.parametrize("name", ["out.pt2", "out.onnx"])
def test_writes_what_the_suffix_says(cli: Cli, tmp_path: Path, name: str) -> None:
    outcome = cli("optimize", TINY, "-o", name)
    assert outcome.code == 0 and (tmp_path / name).stat().st_size > 0
    assert "dead-code" in outcome.out and "nodes" in outcome.out


def test_result_can_be_optimized_again(cli: Cli) -> None:
    assert cli("optimize", TINY, "-o", "once.pt2", "--dynamic", DYNAMIC).code == 0
    report = cli("optimize", "once.pt2", "-o", "twice.pt2", "-O1", "--json").json
    assert [item["rewrites"] for item in report["passes"]] == [[]] * len(report["passes"])


def test_level_0_runs_nothing(cli: Cli) -> None:
    assert cli("optimize", TINY, "-o", "out.pt2", "-O0", "--json").json["passes"] == []


def test_run_pass_with_option(cli: Cli) -> None:
    report = cli("run-pass", "constant-folding", TINY, "-o", "out.pt2", "--option", "max_bytes=64", "--json").json
    assert [item["name"] for item in report["passes"]] == ["constant-folding"]
    assert report["passes"][0]["options"] == {"max-bytes": 64}


def test_what_a_pass_remarks_is_said(cli: Cli) -> None:
    outcome = cli("run-pass", "gated-attention", "tests.passes.test_gated_attention:encoder", "-o", "out.pt2")
    assert "gated-attention: gates added 68 parameters and 960 multiply-adds, at example sizes" in outcome.out


def test_unknown_pass(cli: Cli, tmp_path: Path) -> None:
    cli("run-pass", "dead-cod", TINY, "-o", "out.pt2").refused("unknown pass 'dead-cod'", "'dead-code'")
    assert not (tmp_path / "out.pt2").exists()


def test_unknown_option_of_a_pass(cli: Cli) -> None:
    cli("run-pass", "constant-folding", TINY, "-o", "o.pt2", "--option", "max-byte=1").refused("'max-bytes'")


def test_option_without_value(cli: Cli) -> None:
    cli("run-pass", "constant-folding", TINY, "-o", "o.pt2", "--option", "max-bytes").refused("not K=V")


def test_unknown_target(cli: Cli) -> None:
    cli("optimize", TINY, "-o", "o.pt2", "--target", "cpu:x86-64-v9").refused("unknown target", "cpu:x86-64-v4")


def test_unknown_level(cli: Cli) -> None:
    cli("optimize", TINY, "-o", "o.pt2", "-O4").refused("-O")


@pytest.mark.parametrize(
    ("name", "words"), [("out.txt", "end its name in .pt2 or .onnx"), ("no/o.pt2", "does not exist")]
)
def test_output_is_checked_first(cli: Cli, name: str, words: str) -> None:
    cli("optimize", "no_such:model", "-o", name).refused(words)


def test_the_example_in_the_help_exists(cli: Cli) -> None:
    from graphopt.spec_string import parse_spec
    from graphopt.tools.pass_options import EXAMPLE

    assert len(parse_spec(EXAMPLE)) == 2
    assert EXAMPLE in "".join(cli("optimize", "--help").out.split())


def test_no_passes_is_spelled_as_a_level(cli: Cli) -> None:
    cli("optimize", TINY, "-o", "o.pt2", "--passes", "").refused("--passes is empty", "-O0")


RECIPE = """graphopt: "1.0"
passes: [dead-code, {name: constant-folding, max-bytes: 64}]
verify: structure
seed: 3
"""


def test_a_recipe_runs_with_its_settings(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    report = cli("optimize", TINY, "-o", "out.pt2", "--recipe", "r.yaml", "--json").json
    assert [item["name"] for item in report["passes"]] == ["dead-code", "constant-folding"]
    assert report["passes"][1]["options"] == {"max-bytes": 64} and report["verify"] == "structure"


def test_options_override_the_recipe(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    outcome = cli("optimize", "--recipe", "r.yaml", "--verify", "numeric", "--strict", "--dry-run", "--json")
    plan = outcome.json
    assert plan["passes"][1] == {"pass": "constant-folding", "options": {"max-bytes": 64}, "from": "r.yaml:2"}
    settings = plan["settings"]
    assert settings["verify"] == {"value": "numeric", "from": "--verify"}
    assert settings["strict"] == {"value": True, "from": "--strict"}
    assert settings["seed"] == {"value": 3, "from": "r.yaml:4"}
    assert settings["target"] == {"value": "cpu", "from": "default"}
    assert cli("optimize", "--dry-run", "--json").json["passes"][0]["from"] == "-O2"


def test_dry_run_reads_no_model_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("optimize", "no_such:model", "-o", "out.pt2", "--recipe", "cpu-fast", "--dry-run")
    assert outcome.code == 0 and "max-bytes=1048576" in outcome.out and "cpu-fast:" in outcome.out
    assert not list(tmp_path.iterdir())


def test_every_mistake_of_a_recipe_has_a_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('graphopt: "1.0"\npasses: [dead-cod, O9]\n')
    outcome = cli("optimize", TINY, "-o", "out.pt2", "--recipe", "r.yaml")
    lines = outcome.err.splitlines()
    assert outcome.code == 2 and len(lines) == 2 and not (tmp_path / "out.pt2").exists()
    assert all(line.startswith("graphopt: error: r.yaml:2: unknown ") for line in lines)


@pytest.mark.parametrize(("words", "missing"), [((), "MODEL"), ((TINY,), "-o OUT")])
def test_only_a_dry_run_needs_no_model_and_output(cli: Cli, words: tuple[str, ...], missing: str) -> None:
    cli("optimize", *words).refused(f"{missing} is missing")


def test_a_recipe_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    cli("optimize", "--recipe", "r.yaml", "--dry-run", "--json", "r.yaml").refused("would overwrite the input r.yaml")


def test_a_recipe_and_passes(cli: Cli) -> None:
    cli("optimize", TINY, "--recipe", "cpu-fast", "--passes", "dead-code").refused("not allowed with")


def test_the_schema_of_recipes(cli: Cli) -> None:
    assert cli("list-passes", "--schema").json["title"] == "graphopt recipe"


def test_a_schema_goes_where_json_says(cli: Cli) -> None:
    for verb in ("list-passes", "explain"):
        assert cli(verb, "--schema", "--json", "schema.json").out == ""
        assert json.loads(Path("schema.json").read_text()) == cli(verb, "--schema").json
    cli("explain", "--schema", "--node", "linear").refused("--node has no effect with --schema")


def test_a_dry_run_refuses_what_a_run_refuses(cli: Cli) -> None:
    cli("optimize", "--dry-run", "--metric", "acuracy").refused("metric 'acuracy' is neither accuracy, cosine, snr nor")
    cli("optimize", "--dry-run", "--data", "nowhere.npz").refused("--data 'nowhere.npz' does not exist")


def test_the_summary_has_the_metric(cli: Cli, inputs: Callable[..., Path]) -> None:
    path = inputs(x=np.ones((10, 8), np.float32))
    outcome = cli("optimize", TINY, "-o", "out.pt2", "--dynamic", DYNAMIC, "--data", path, "--metric", "cosine")
    assert "cosine  1 -> 1 on held-out data" in outcome.out


BRANCHING = "tests.tools.tiny_models:branching"


def test_the_summary_names_the_most_frequent_reasons(cli: Cli) -> None:
    outcome = cli("optimize", TINY, "-o", "out.pt2")
    assert "merge-linears  declined      1  linear  no other linear reads the same input" in outcome.out
    assert "graphopt explain" in outcome.out
    assert "operator" not in outcome.out


def test_verbose_counts_operators(cli: Cli) -> None:
    outcome = cli("optimize", BRANCHING, "-o", "out.pt2", "--verbose")
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["aten.linear.default", "2", "1"] in rows and ["aten.clone.default", "1", "0"] in rows
    assert "every operator" in cli("optimize", BRANCHING, "-o", "out.pt2", "-O0", "--verbose").out


def test_what_was_taken_back_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.tools.optimize import print_passes
    from tests.test_explain import report_of
    from tests.test_explain_taken_back import Doubling

    print_passes(report_of(lambda model, x: x.relu() + x.sin().relu(), Doubling()))
    assert "doubling  rolled back      2  relu  wrong on its own: " in capsys.readouterr().out


@pytest.mark.parametrize("verb", [("optimize",), ("run-pass", "dead-code")])
def test_page_of_what_changed(cli: Cli, tmp_path: Path, verb: tuple[str, ...]) -> None:
    outcome = cli(*verb, TINY, "-o", "b.pt2", "--html", "page.html")
    assert outcome.code == 0 and "wrote b.pt2 and page.html" in outcome.out, outcome.err
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_page_with_another_ending(cli: Cli, tmp_path: Path) -> None:
    cli("optimize", TINY, "-o", "b.pt2", "--html", "page.pt2").refused(".html")
    assert not (tmp_path / "b.pt2").exists()
