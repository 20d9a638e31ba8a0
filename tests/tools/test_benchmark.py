from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from graphopt.tools.benchmarking.child import measure_turn
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.peers import PEERS, check_peers, installed
from graphopt.tools.benchmarking.report import AGREE, build_report, format_rows, largest_error
from graphopt.tools.benchmarking.sides import Opened
from graphopt.tools.benchmarking.turns import Contest, Entrant, Failure, Measurement, Side, schedule, take_turns
from graphopt.tools.benchmarking.usage import Interference, Usage, interference
from tests.tools.conftest import DYNAMIC, TINY, Cli

CORES = sorted(os.sched_getaffinity(0))[:1]
X = {"x": np.ones((3, 8), np.float32)}


def test_two_sides_of_one_artifact(artifact: str) -> None:
    sides = [Entrant("graphopt", artifact)] * 2
    results, failures, others = take_turns(sides, X, CORES, rounds=1, turn=0.01, alone=0.01)
    assert len(results) == 2 and not failures and all(len(r.turns) >= 3 and len(r.alone) >= 3 for r in results)
    assert 0 <= others.elsewhere <= 1.5
    assert np.array_equal(results[0].outputs[0], results[1].outputs[0])


def test_a_side_that_cannot_open_its_model_says_why(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.gopt")
    with pytest.raises(GraphoptError, match=r"graphopt cannot run this model: .*no\.gopt"):
        take_turns([Entrant("graphopt", missing)], X, CORES, rounds=1)


def test_a_peer_that_fails_is_named_and_the_others_go_on(artifact: str, tmp_path: Path) -> None:
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    sides = [
        Entrant("graphopt", artifact),
        Entrant("onnxruntime", str(tmp_path / "rubbish.onnx")),
        Entrant("graphopt", artifact),
    ]
    results, (failure,), _ = take_turns(sides, X, CORES, rounds=1, turn=0.01, alone=0.01)
    assert [len(result.turns) >= 3 for result in results] == [True, True]
    assert failure.side == "onnxruntime" and "cannot run this model" in failure.reason


def test_a_side_that_takes_too_long_is_told_the_option(artifact: str, tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match=r"graphopt took over 0\.001 s while it opened its model; --peer-timeout"):
        take_turns([Entrant("graphopt", artifact)], X, CORES, rounds=1, patience=0.001)


def test_a_side_that_dies_is_quoted(artifact: str, tmp_path: Path) -> None:
    with Side(Entrant("graphopt", artifact), tmp_path / "none.npz", tmp_path / "outputs.npz", CORES) as side:
        side.kill()
        side.process.wait()
        side.log.write_text("terminate called\nout of registers\n")
        contest = Contest()
        with pytest.raises(GraphoptError, match="ended with code -9 while it opened its model: out of registers"):
            contest.open(side, 0.01)


class Fixed(Side):
    """A side whose calls take the seconds they are said to."""

    def __init__(self, seconds: float, sparing: bool) -> None:
        self.name, self.seconds, self.sparing = "fixed", seconds, sparing

    def measure(self, seconds: float) -> list[float]:
        return [self.seconds]


@pytest.mark.parametrize(("sparing", "turns"), [(True, 2), (False, 5)])
def test_a_slow_side_that_is_sparing_sits_out(sparing: bool, turns: int) -> None:
    contest = Contest([Fixed(8.0, sparing)], [measurement("tvm", [], [])])
    for _ in range(5):
        contest.turn(0, 0.2, True)
    assert len(contest.results[0].turns) == turns


def test_turns_drop_their_first_call_unless_the_side_is_sparing() -> None:
    calls = iter([9.0, 1.0, 2.0, 3.0, 9.0, 4.0])
    opened = Opened(list, {}, lambda: [next(calls)])
    assert measure_turn(opened, 0.0, sparing=False) == [1.0, 2.0, 3.0]
    assert measure_turn(opened, 5.0, sparing=True) == [9.0]


def test_schedule_gives_every_side_the_same_turns() -> None:
    order = list(schedule(2, 6))
    assert [order.count((side, together)) for side in (0, 1) for together in (True, False)] == [6, 3, 6, 3]
    assert order[:6] == [(0, True), (1, True), (1, True), (0, True), (0, False), (1, False)]


def measurement(side: str, turns: list[float], alone: list[float], output: float = 1.0) -> Measurement:
    return Measurement(side, {}, 0.1, 1000, [np.array([1.0, output])], turns, alone)


def test_report_holds_ratio_validity_and_error() -> None:
    steady = measurement("graphopt", [1.0, 2.0, 3.0], [2.0])
    disturbed = measurement("onnxruntime", [4.0], [3.7], output=1.0 + 2 * AGREE)
    report = build_report([steady, disturbed], [], Interference(0.0, 0.0), X, None, CORES, 1)
    assert [row["ratio"] for row in report["rows"]] == [1.0, 2.0]
    assert [row["valid"] for row in report["rows"]] == [True, False]
    assert not report["agree"] and report["rows"][0]["error"] == 0


def test_no_row_is_valid_on_a_busy_machine() -> None:
    steady = measurement("graphopt", [2.0], [2.0])
    (row,) = build_report([steady], [], Interference(0.2, 0.0), X, None, CORES, 1)["rows"]
    assert not row["valid"]


def test_a_failure_is_a_row_with_its_reason() -> None:
    failure = Failure("inductor", "there is no C++ compiler")
    report = build_report([measurement("graphopt", [2.0], [2.0])], [failure], Interference(0, 0), X, None, CORES, 1)
    assert report["failures"] == [{"side": "inductor", "reason": "there is no C++ compiler"}] and report["agree"]
    assert "inductor  none" in format_rows(report) and "no figures: there is no C++ compiler" in format_rows(report)


def test_all_are_the_installed_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_peers("all") == [name for name in PEERS if installed(name)] and "inductor" in check_peers("all")
    assert check_peers("tvm, onnxruntime,tvm") == ["tvm", "onnxruntime"]


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
        (("--against", "tensorrt"), "unknown runtime 'tensorrt'"),
        (("--against", "tvm,before.gopt"), "--against before.gopt: there is no such file"),
        (("--threads", "1000"), "1 to"),
        (("--rounds", "0"), "--rounds 0"),
        (("--peer-timeout", "0"), "--peer-timeout 0"),
        (("--chart", "x.png"), "--chart belongs to --suite"),
        (("--suite", "e2e"), "not both"),
    ],
)
def test_wrong_options(cli: Cli, words: tuple[str, ...], expected: str) -> None:
    cli("benchmark", TINY, *words).refused(expected)


def test_an_artifact_alone_has_nothing_for_others_to_run(cli: Cli, artifact: str) -> None:
    cli("benchmark", artifact, "--against", "onnxruntime").refused("--model MODEL")


def test_artifacts_take_turns_under_their_names(cli: Cli, artifact: str) -> None:
    outcome = cli("benchmark", artifact, "--against", artifact, "--rounds", 1, "--threads", 1, "--json")
    first, second = outcome.json["rows"]
    assert (first["side"], second["side"]) == ("graphopt", Path(artifact).name)
    assert outcome.code == 0 and second["error"] == 0 and second["about"]["target"]


def test_something_must_be_timed(cli: Cli) -> None:
    cli("benchmark").refused("MODEL or --suite")


def test_settings_are_checked() -> None:
    assert Settings(CORES, 1).patience > 0
    with pytest.raises(GraphoptError, match="--peer-timeout"):
        Settings(CORES, 1, float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_against_a_peer(cli: Cli, peer: str) -> None:
    if not installed(peer):
        pytest.skip(f"{peer} is not installed")
    outcome = cli("benchmark", TINY, "--against", peer, "--rounds", 1, "--threads", 1, "--dynamic", DYNAMIC, "--json")
    report = outcome.json
    assert [row["side"] for row in report["rows"]] == ["graphopt", peer], report["failures"]
    assert outcome.code == 0 and report["reference"] == "PyTorch" and report["agree"]
    assert any(character.isdigit() for character in str(report["rows"][1]["about"]))


@pytest.mark.slow
def test_inductor_without_a_compiler_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = cli("benchmark", TINY, "--against", "inductor", "--rounds", 1, "--threads", 1)
    assert outcome.code == 1 and "there is no C++ compiler 'no-such-compiler'; install g++" in outcome.out
