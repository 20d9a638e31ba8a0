from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from graphopt.tools.benchmarking.report import AGREE, build_report, largest_error
from graphopt.tools.benchmarking.turns import Entrant, Measurement, schedule, take_turns
from graphopt.tools.benchmarking.usage import Interference, Usage, interference
from tests.tools.conftest import DYNAMIC, TINY, Cli

CORES = sorted(os.sched_getaffinity(0))[:1]
X = {"x": np.ones((3, 8), np.float32)}


def test_two_sides_of_one_artifact(artifact: str) -> None:
    results, others = take_turns([Entrant("graphopt", artifact)] * 2, X, CORES, rounds=1, turn=0.01, alone=0.01)
    assert len(results) == 2 and all(len(r.turns) >= 3 and len(r.alone) >= 3 for r in results)
    assert 0 <= others.elsewhere <= 1.5
    assert np.array_equal(results[0].outputs[0], results[1].outputs[0])


def test_a_side_that_cannot_open_its_model_says_why(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.gopt")
    with pytest.raises(GraphoptError, match=r"graphopt cannot run this model: .*no\.gopt"):
        take_turns([Entrant("graphopt", missing)], X, CORES, rounds=1)


def test_schedule_gives_every_side_the_same_turns() -> None:
    order = list(schedule(2, 6))
    assert [order.count((side, together)) for side in (0, 1) for together in (True, False)] == [6, 3, 6, 3]
    assert order[:6] == [(0, True), (1, True), (1, True), (0, True), (0, False), (1, False)]


def measurement(side: str, turns: list[float], alone: list[float], output: float = 1.0) -> Measurement:
    return Measurement(side, {}, 0.1, 1000, [np.array([1.0, output])], turns, alone)


def test_report_holds_ratio_validity_and_error() -> None:
    steady = measurement("graphopt", [1.0, 2.0, 3.0], [2.0])
    disturbed = measurement("onnxruntime", [4.0], [3.7], output=1.0 + 2 * AGREE)
    report = build_report([steady, disturbed], Interference(0.0, 0.0), X, None, CORES, 1)
    assert [row["ratio"] for row in report["rows"]] == [1.0, 2.0]
    assert [row["valid"] for row in report["rows"]] == [True, False]
    assert not report["agree"] and report["rows"][0]["error"] == 0


def test_no_row_is_valid_on_a_busy_machine() -> None:
    steady = measurement("graphopt", [2.0], [2.0])
    (row,) = build_report([steady], Interference(0.2, 0.0), X, None, CORES, 1)["rows"]
    assert not row["valid"]


def test_interference_is_what_is_left_after_our_own_time() -> None:
    found = interference(Usage(0, 10, 1, 5), Usage(10, 28, 2, 21), [0, 1])
    assert (found.elsewhere, found.stolen) == (0.1, 0.05)


def test_errors_of_outputs() -> None:
    one = np.array([0.0, 4.0])
    assert largest_error([one], [np.array([0.0, 5.0])]) == 0.25
    assert largest_error([one], [np.array([0.0, np.nan])]) == float("inf")
    assert largest_error([one], [one[:1]]) == largest_error([one], []) == float("inf")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--against", "onxruntime"), "'onnxruntime'"),
        (("--against", "openvino"), "unknown runtime 'openvino'"),
        (("--threads", "1000"), "1 to"),
        (("--rounds", "0"), "--rounds 0"),
    ],
)
def test_wrong_options(cli: Cli, words: tuple[str, ...], expected: str) -> None:
    cli("benchmark", TINY, *words).refused(expected)


def test_an_artifact_alone_has_nothing_for_others_to_run(cli: Cli, artifact: str) -> None:
    cli("benchmark", artifact, "--against", "onnxruntime").refused("--model MODEL")


@pytest.mark.slow
def test_against_onnxruntime(cli: Cli) -> None:
    outcome = cli("benchmark", TINY, "--against", "onnxruntime", "--rounds", 1, "--dynamic", DYNAMIC, "--json")
    report = outcome.json
    assert [row["side"] for row in report["rows"]] == ["graphopt", "onnxruntime"]
    assert outcome.code == 0 and report["reference"] == "PyTorch" and report["agree"]
