from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphopt.tools.compare import difference
from tests.tools.conftest import DYNAMIC, TINY, Cli

OTHER = "tests.tools.tiny_models:other_dense"


def test_a_model_agrees_with_itself(cli: Cli) -> None:
    report = cli("compare", TINY, TINY, "--json").json
    assert report["within"] and report["outputs"][0]["max_abs"] == 0


def test_other_weights_differ(cli: Cli) -> None:
    outcome = cli("compare", TINY, OTHER)
    assert outcome.code == 1 and "outside atol" in outcome.out


def test_tolerance_is_the_callers(cli: Cli) -> None:
    assert cli("compare", TINY, OTHER, "--atol", "100").code == 0


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_what_is_no_tolerance(cli: Cli, tolerance: str) -> None:
    cli("compare", TINY, TINY, f"--atol={tolerance}").refused("--atol", "no tolerance")


def test_model_against_its_artifact(cli: Cli, artifact: str) -> None:
    outcome = cli("compare", TINY, artifact, "--dynamic", DYNAMIC, "--size", "rows=7,rows=7")
    assert outcome.code == 0, outcome.out + outcome.err


def test_inputs_from_a_file(cli: Cli, inputs: Callable[..., Path]) -> None:
    assert cli("compare", TINY, TINY, "--input", inputs(x=np.zeros((3, 8), np.float32))).code == 0


def test_wrong_input_name_in_a_file(cli: Cli, inputs: Callable[..., Path]) -> None:
    cli("compare", TINY, TINY, "--input", inputs(y=np.zeros((3, 8), np.float32))).refused("unknown input 'y'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "row=7"), ("unknown size 'row'", "'rows'")),
        (("--size", "rows=many"), ("--size seq=128",)),
        (("--shape", "x:7x9"), ("axis 1", "8")),
        (("--shape", "x:7"), ("1 axes", "2")),
        (("--shape", "y:7x8"), ("unknown input 'y'",)),
        (("--shape", "x:7x8", "--size", "rows=6"), ("6", "7")),
    ],
)
def test_impossible_sizes(cli: Cli, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    cli("compare", TINY, TINY, "--dynamic", DYNAMIC, *options).refused(*words)


def test_measures() -> None:
    found = difference(np.array([1.0, 2.0, 0.0]), np.array([1.0, 2.5, 0.25]), 0.1, 0.1)
    assert (found["max_abs"], found["max_rel"], found["within"]) == (0.5, 0.25, False)
    assert math.isclose(found["cosine"], 6 / math.sqrt(5 * 7.3125))


def test_equal_nans_agree_and_shapes_must_match() -> None:
    nan = np.array([np.nan, 1.0])
    assert difference(nan, nan, 0, 0)["within"]
    assert not difference(nan, np.array([1.0, 1.0]), 0, 0)["within"]
    assert not difference(np.zeros(3), np.zeros((1, 3)), 1, 1)["within"]


@pytest.fixture
def optimized_tiny(cli: Cli, tmp_path: Path) -> Path:
    assert cli("optimize", TINY, "--dynamic", DYNAMIC, "-o", "b.pt2", "--json", "report.json").code == 0
    return tmp_path / "b.pt2"


def test_page_of_both_graphs(cli: Cli, optimized_tiny: Path, tmp_path: Path) -> None:
    outcome = cli(
        "compare", TINY, optimized_tiny, "--dynamic", DYNAMIC, "--html", "page.html", "--report", "report.json"
    )
    assert outcome.code == 0 and "wrote page.html" in outcome.out, outcome.err
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "aten.linear.default" in page and '"passes":[{"name":' in page


def test_page_of_models_that_differ(cli: Cli, tmp_path: Path) -> None:
    assert cli("compare", TINY, OTHER, "--html", "page.html").code == 1
    assert "other values" in (tmp_path / "page.html").read_text()


def test_page_with_times(cli: Cli, tmp_path: Path) -> None:
    kernel = {"kernel": "fused", "nodes": ["linear"], "seconds": 0.001, "share": 1.0}
    (tmp_path / "times.json").write_text(json.dumps({"kernels": [kernel]}))
    assert cli("compare", TINY, TINY, "--html", "page.html", "--profile", "times.json").code == 0
    assert '"seconds":0.001' in (tmp_path / "page.html").read_text()


def test_no_page_of_an_artifact(cli: Cli, artifact: str, tmp_path: Path) -> None:
    cli("compare", TINY, artifact, "--dynamic", DYNAMIC, "--html", "page.html").refused("compiled", "model")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--report", "x.json"), ("--report", "--html")),
        (("--profile", "x.json"), ("--profile", "--html")),
        (("--html", "page.txt"), (".html",)),
        (("--html", "page.html", "--report", "none.json"), ("none.json",)),
        (("--html", "page.html", "--report", "text.json"), ("no JSON",)),
        (("--html", "page.html", "--report", "list.json"), ("no JSON object",)),
        (("--html", "page.html", "--report", "empty.json"), ("report", "format")),
        (("--html", "page.html", "--profile", "empty.json"), ("profile", "kernels")),
        (("--html", "page.html", "--json", "page.html"), ("--html", "--json")),
    ],
)
def test_impossible_pages(cli: Cli, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    for name, text in (("text", "{"), ("list", "[]"), ("empty", "{}")):
        (tmp_path / f"{name}.json").write_text(text)
    cli("compare", TINY, TINY, *options).refused(*words)
    assert not (tmp_path / "page.html").exists()


def test_page_never_takes_the_place_of_an_input(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("{}")
    cli("compare", TINY, TINY, "--html", "report.html", "--report", "report.html").refused("overwrite")
    assert (tmp_path / "report.html").read_text() == "{}"
