from __future__ import annotations

import pytest

from graphopt.errors import UsageError
from graphopt.tools import doctor
from tests.tools.conftest import Cli


def test_this_machine_is_healthy(cli: Cli) -> None:
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    assert all(word in outcome.out for word in ("tvm runtime", "linker", "cache folder", "the pinned pair", "build"))


def test_a_target_is_checked(cli: Cli) -> None:
    checks = {item["check"]: item for item in cli("doctor", "--target", "cpu", "--json").json["checks"]}
    assert checks["target cpu"]["state"] == "ok"


def test_unknown_target(cli: Cli) -> None:
    cli("doctor", "--target", "cpu:x86-64-v9").refused("unknown target", "cpu:x86-64-v4")


def test_a_target_this_cpu_cannot_run(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr("graphopt.runtime.features.missing", lambda features: ("avx512f",))
    outcome = cli("doctor", "--target", "cpu:x86-64-v4")
    assert outcome.code == 1 and "lacks avx512f" in outcome.out


def test_no_linker(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr("graphopt.backends.linker.find_linker", lambda: None)
    outcome = cli("doctor")
    assert outcome.code == 1 and "pip install ziglang" in outcome.out


def test_a_cc_that_is_not_there(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("CC", "no-such-cc -Wall")
    outcome = cli("doctor")
    assert outcome.code == 1 and "CC is 'no-such-cc -Wall'" in outcome.out


def test_a_finding_tells_what_is_wrong() -> None:
    def broken() -> str:
        raise UsageError("that is wrong")

    assert doctor.finding("thing", broken) == ("thing", "problem", "that is wrong")
