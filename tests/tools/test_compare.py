from __future__ import annotations

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
