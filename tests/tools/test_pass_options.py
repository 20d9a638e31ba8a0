from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from graphopt.tools.pass_options import add_pass_choice, chosen_recipe, optimize_settings
from tests.tools.conftest import TINY, Cli

VERBS = [
    ("optimize", TINY, "-o", "o.pt2"),
    ("run-pass", "dead-code", TINY, "-o", "o.pt2"),
    ("compile", TINY, "-o", "o.gopt"),
]


def parse(*words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_pass_choice(parser)
    return optimize_settings(chosen_recipe(parser.parse_args(words)))


def test_data_and_metric_are_what_optimize_takes(tmp_path: Path) -> None:
    assert parse() == {}
    assert parse("--data", str(tmp_path), "--metric", "snr") == {"data": str(tmp_path), "metric": "snr"}
    assert parse("--metric", "math:hypot") == {"metric": math.hypot}


def test_a_metric_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('graphopt: "1.0"\npasses: [dead-code]\nmetric: cosine\n')
    assert parse("--recipe", str(recipe)) == {"metric": "cosine"}
    assert parse("--recipe", str(recipe), "--metric", "math:hypot") == {"metric": math.hypot}


@pytest.mark.parametrize("verb", VERBS, ids=[verb[0] for verb in VERBS])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "none.npz"), "--data 'none.npz' does not exist"),
        (("--metric", "f1"), "metric 'f1' is neither accuracy, cosine, snr nor package.module:function"),
        (("--metric", "math:f1"), "math has no function 'f1'; name one that returns a number for (outputs, labels)"),
        (("--metric", "no_such:f1"), "cannot import no_such"),
    ],
)
def test_what_cannot_be_used_is_seen_before_the_work(
    cli: Cli, verb: tuple[str, ...], words: tuple[str, str], message: str
) -> None:
    cli(*verb, *words).refused(message)
