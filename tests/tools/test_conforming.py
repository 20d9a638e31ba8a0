"""ONNX's own tests as a command: what it counts, what it survives, and that what passes goes on passing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from graphopt.tools.conforming import cases, one_test, pool
from graphopt.tools.conforming.cases import Case, describe, not_applicable, of_node_test
from graphopt.tools.conforming.coverage_page import coverage_page, passing_list
from graphopt.tools.conforming.judge import Mismatch, judge
from graphopt.tools.conforming.names import MODES
from graphopt.tools.conforming.one_test import run_case
from tests.capture.onnx.tiny import model_of
from tests.tools.conftest import Cli

PASSING = Path(__file__).parent / "onnx_passing.txt"
APPLICABLE = 1810  # of the 1884 node tests of onnx 1.23.2
SAMPLE = ("add", "clip", "expand", "gemm", "hardsigmoid", "lstm", "pow", "reshape", "slice", "topk")  # files of onnx
UNEQUAL = {
    # Rows that a mask leaves nothing of: 0 here, their mean in ONNX Runtime, by the exporter's form of attention.
    "roundtrip": {"node test_attention_4d_causal_nonpad_negative_offset_structural_empty"},
}
X = np.array([[-1.5, 2.0, 3.25]], dtype=np.float32)


def floats(values: Any) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def case_of(operator: str, wanted: Any, name: str = "test_tiny", x: Any = X) -> Case:
    model = model_of([helper.make_node(operator, ["x"], ["y"])], {"x": ("float32", list(x.shape))}, ["y"])
    return Case("node", name, model, [[x]], [[np.asarray(wanted)]], 1e-3, 1e-7)


def known_to_pass(mode: str) -> set[str]:
    """By suite and name, as the last run of `make conformance` left it."""
    lines = (line.split() for line in PASSING.read_text().splitlines())
    return {f"{suite} {name}" for suite, name, *modes in lines if mode in modes}


def test_errors_are_counted_in_steps_of_the_type() -> None:
    one = np.ones(3, np.float32)
    assert judge([one], [one], 1e-3, 1e-7) == 0
    assert judge([one], [one + np.float32(2.0**-22)], 1e-3, 1e-7) == 2
    assert judge([one * 0], [one * 1e-9], 1e-3, 1e-7) == pytest.approx(1e-9 / 2.0**-37, rel=1e-3)  # a step at 1e-4
    assert judge([np.array([np.nan, np.inf])], [np.array([np.nan, np.inf])], 0, 0) == 0
    for name, steps in (("float16", 2.0**-9), ("bfloat16", 2.0**-6)):
        near = np.ones(1, name if name == "float16" else ml_dtypes.bfloat16)
        assert judge([near], [(near + np.asarray(steps, near.dtype))], 1e-3, 1e-7) == 2
        with pytest.raises(Mismatch):
            judge([near], [near + np.asarray(steps * 1.5, near.dtype)], 1e-3, 1e-7)


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (floats([1, 2]), "value"),
        (floats([1, np.nan]), "value"),
        (floats([[1, 3]]), "shape"),
        (np.array([1.0, 3.0]), "type"),
        (np.array([1, 3], ml_dtypes.int4), "type"),
    ],
)
def test_what_is_not_asked_for_is_wrong(wanted: Any, kind: str) -> None:
    with pytest.raises(Mismatch) as caught:
        judge([wanted], [floats([1, 3])], 1e-3, 1e-7)
    assert caught.value.kind == kind
    with pytest.raises(Mismatch, match="2 outputs where 1"):
        judge([wanted], [wanted, wanted], 1e-3, 1e-7)


@pytest.mark.parametrize("mode", ["eager", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_outcomes(mode: str) -> None:
    assert run_case(case_of("Abs", np.abs(X)), mode)["outcome"] == "passed"
    refused = run_case(case_of("RandomUniformLike", X), mode)
    assert (refused["outcome"], "random numbers" in refused["reason"]) == ("not-applicable", True)
    wrong = run_case(case_of("Abs", X), mode)
    peers = mode == "roundtrip"
    assert (wrong["outcome"], wrong.get("kind")) == (("not-applicable", None) if peers else ("wrong", "value"))


def test_errors_that_no_one_meant_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by\n  zero")

    monkeypatch.setattr("graphopt.backends.onnx.prepare", broken)
    record = run_case(case_of("Abs", X), "eager")
    assert {key: record[key] for key in ("outcome", "kind", "reason")} == {
        "outcome": "failed",
        "kind": "ZeroDivisionError",
        "reason": "ZeroDivisionError: by zero",
    }


def test_operators_of_functions_are_those_that_they_are_the_body_of() -> None:
    whole, body = case_of("Abs", X, "test_a"), case_of("Neg", X, "test_a_expanded_ver18")
    known = {case.name: case for case in (whole, body)}
    assert describe(body, known) == {
        "test": "test_a_expanded_ver18", "suite": "node", "operator": "Abs", "opset": 20,
    }  # fmt: skip
    assert describe(body, {body.name: body})["operator"] == "Neg"
    strings = case_of("Abs", X)
    strings.model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    assert not_applicable(strings) == "strings" and not_applicable(whole) is None


def _die(case: Case, mode: str) -> dict[str, Any]:
    """In place of `run_case`: what the name says."""
    if "dies" in case.name:
        os.kill(os.getpid(), signal.SIGKILL)
    while "spins" in case.name:  # until its processor time is up
        pass
    return {"outcome": "passed", "ulp": 0.0, "process": os.getpid()}


def test_a_process_that_dies_loses_its_own_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_test, "run_case", _die)
    monkeypatch.setattr(pool, "MEMORY", 1 << 40)
    found = dict(pool.run_all([case_of("Abs", X, name) for name in ("a", "dies", "b")], "eager", 1, 60.0))
    assert [found[n]["outcome"] for n in range(3)] == ["passed", "crashed", "passed"]
    assert found[1]["kind"] == "SIGKILL" and found[0]["process"] != found[2]["process"]


@pytest.mark.slow
def test_a_test_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_test, "run_case", _die)
    monkeypatch.setattr(pool, "MEMORY", 1 << 40)
    found = dict(pool.run_all([case_of("Abs", X, name) for name in ("a", "spins")], "eager", 2, 1.0))
    assert (found[0]["outcome"], found[1]["kind"]) == ("passed", "time")


def test_a_run_goes_on_where_it_ended(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [case_of("Abs", np.abs(X), f"test_{letter}") for letter in "abc"]
    monkeypatch.setattr(cases, "load_cases", lambda suites, patterns: given)
    ran: list[str] = []

    def run(left: Sequence[Case], mode: str, *_: Any) -> Any:
        for number, case in enumerate(left):
            ran.append(case.name)
            yield number, {"outcome": "passed", "ulp": 1.5, "seconds": 0.1}

    monkeypatch.setattr(pool, "run_all", run)
    (tmp_path / "r.jsonl").write_text(
        json.dumps({**describe(given[1], {}), "mode": "eager", "outcome": "refused", "reason": "no"}) + '\n{"cut'
    )
    outcome = cli("conformance", "-o", "r.jsonl", "--resume", "--markdown", "page.md", "--passing", "list.txt")
    assert outcome.code == 0 and ran == ["test_a", "test_c"] and "refused" in outcome.out
    assert (tmp_path / "list.txt").read_text() == "node test_a eager\nnode test_c eager\n"
    assert "| node | eager | 3 | 3 | 2 | 0 | 1 | 0 | 0 | 0 |" in (tmp_path / "page.md").read_text()
    assert cli("conformance", "-o", "r.jsonl", "--resume").code == 0 and len(ran) == 2
    assert [json.loads(line)["test"] for line in (tmp_path / "r.jsonl").read_text().splitlines()].count("test_b") == 1
    cli("conformance", "--resume").refused("--resume needs -o FILE")
    cli("conformance", "--processes", "0").refused("must be above 0")


def test_the_page_says_every_reason_once() -> None:
    base = {"suite": "node", "operator": "Conv", "opset": 11, "test": "test_a"}
    records: list[Mapping[str, Any]] = [
        {**base, "mode": "eager", "outcome": "passed", "ulp": 1.0, "bound": ["k"]},
        {**base, "mode": "compiled", "outcome": "wrong", "reason": "output 0 is 1"},
        {**base, "test": "test_b", "mode": "eager", "outcome": "refused", "reason": "ONNX node Conv 'y' of [1]: no *"},
        {**base, "test": "test_c", "mode": "eager", "outcome": "refused", "reason": "ONNX node Conv 'z' of [2]: no *"},
    ]
    page = coverage_page(records)
    assert page == coverage_page(records[::-1])
    assert "| Conv | 11 | 1/3 | 1 | 1 | 0/1 |  |  |" in page
    assert "- Conv: no \\*\n  - `test_b` (eager)\n  - `test_c` (eager)" in page
    assert "### wrong: 1 tests" in page and "### crashed: none" in page
    assert passing_list(records) == "node test_a eager\n"


def sample() -> list[Case]:
    """Node tests of a few operators: to make all of them takes longer than to run these."""
    from onnx.backend.test.case import node

    for name in SAMPLE:
        importlib.import_module(f"{node.__name__}.{name}")
    made = {test.name: test for test in node._NodeTestCases}
    prefixes = tuple(f"test_{name.replace('topk', 'top_k')}" for name in SAMPLE)
    return [of_node_test(test) for name, test in made.items() if name.startswith(prefixes)]


def test_what_passed_passes() -> None:
    given = sample()
    ran = {f"node {case.name}" for case in given}
    passed = {f"node {case.name}" for case in given if run_case(case, "eager")["outcome"] == "passed"}
    known = known_to_pass("eager") & ran
    assert known <= passed and len(known) > 80, known - passed


def results(*words: str) -> list[dict[str, Any]]:
    """Of the command, which runs in a process of its own: it forks, and this one has threads."""
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "conformance", "--json", *words], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check(records: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Nothing is wrong, and what passed passes."""
    found = {f"{record['suite']} {record['test']}": record for record in records}
    bad = {name for name, record in found.items() if record["outcome"] in ("wrong", "failed", "crashed")}
    assert bad <= UNEQUAL.get(mode, set()), [found[name] for name in bad]
    passed = {name for name, record in found.items() if record["outcome"] == "passed"}
    known = known_to_pass(mode) & found.keys()
    assert known and known <= passed, known - passed


@pytest.mark.slow
def test_every_test_eager() -> None:
    records = results("--suite", "node", "--suite", "simple", "--suite", "light")
    check(records, "eager")
    applicable = [r for r in records if r["suite"] == "node" and r["outcome"] != "not-applicable"]
    assert len(applicable) == APPLICABLE


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", "roundtrip"])
def test_one_of_eight_in_every_mode(mode: str) -> None:
    names = [line.split()[1] for line in PASSING.read_text().splitlines() if line.startswith("node")]
    check(results("--mode", mode, *(word for name in names[::8] for word in ("--only", name))), mode)
