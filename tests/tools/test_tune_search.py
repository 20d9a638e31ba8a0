"""`graphopt tune MODEL` and what other commands make of what it found, on made-up times."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backends.tuner.store import NAME, Store
from tests.fake_device import SECONDS, FakeMeasurer, install
from tests.tools.conftest import DYNAMIC, TINY, Cli

MODEL = (TINY, "--dynamic", DYNAMIC)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeasurer]:
    return install(monkeypatch)


def test_tune_then_compile(cli: Cli) -> None:
    outcome = cli("tune", *MODEL, "--budget", SECONDS, "--store", "s")
    assert outcome.code == 0, outcome.err
    head, row, _, summary, *_ = outcome.out.splitlines()
    assert head.split()[:9] == ["of", "time", "tried", "default", "us", "best", "us", "gain", "workload"]
    assert row.startswith("100.0%") and "6/6" in row and "packed-gemm" in row and "rows=?" in row
    assert summary.startswith("1 of 1 workloads faster, by ") and summary.endswith(f"kept in {Path('s').resolve()}")

    compiled = cli("compile", *MODEL, "-o", "m.gopt", "--database", "s", "--json").json["artifact"]
    assert len(compiled["tuned"]) == 1 and compiled["notes"] == []
    assert "1 tuned, 0 slow" in cli("compile", *MODEL, "-o", "m.gopt", "--database", "s").out
    untuned = cli("compile", *MODEL, "-o", "n.gopt", "--database", "none", "--json").json["artifact"]
    assert untuned["tuned"] == [] and Path("m.gopt").read_bytes() != Path("n.gopt").read_bytes()


def test_json_and_resuming(cli: Cli) -> None:
    words = ("tune", *MODEL, "--budget", SECONDS, "--store", "s", "--seed", "5", "--json")
    first, second = cli(*words).json, cli(*words).json
    (row,) = first["workloads"]
    assert row["measured_now"] and row["gain"] == pytest.approx(row["default_seconds"] / row["seconds"])
    assert row["workload"]["rule"] == "packed-gemm" and row["share"] == pytest.approx(1) and not first["dropped"]
    assert second["workloads"] == [{**row, "measured_now": False, "share": second["workloads"][0]["share"]}]
    (record,) = Store("s").records()
    assert record.provenance["seed"] == "5" and dict(record.configuration) == row["configuration"]


def test_compile_tunes(cli: Cli) -> None:
    words = ("compile", *MODEL, "-o", "m.gopt", "--tune", SECONDS, "--json")
    assert cli(*words, "--database", "s").json["artifact"]["tuned"] and Path("s", NAME).exists()
    assert cli(*words, "--database", "none").json["artifact"]["tuned"]  # kept nowhere
    assert {path.name for path in Path().iterdir()} == {"s", "m.gopt"}


def test_ctrl_c_says_where_results_are(cli: Cli, device: type[FakeMeasurer]) -> None:
    device.interrupted_after = 2
    outcome = cli("tune", *MODEL, "--budget", SECONDS, "--store", "s")
    assert outcome.code == 130 and outcome.out == ""
    assert outcome.err.splitlines() == [
        f"graphopt: what was found so far is in {Path('s').resolve()}",
        "graphopt: interrupted",
    ]


def test_commands_that_cannot_be_meant(cli: Cli) -> None:
    cli("tune", *MODEL, "--budget", "0").refused("tuning for 0.0 seconds is not possible")
    cli("tune", TINY, "--list").refused("--list has no effect with MODEL")
    cli("tune", TINY, "--export", "x").refused("--export has no effect with MODEL")
    cli("tune", TINY, "--device", "x").refused("--device has no effect with MODEL")
    cli("tune", "--list", "--budget", "3").refused("--budget has no effect without MODEL")
    cli("tune", "--list", "-O1").refused("-O has no effect without MODEL")
    cli("tune", "--list", "--dynamic", DYNAMIC).refused("--dynamic has no effect without MODEL")
    cli("tune", *MODEL, "--target", "cpu:x86-64-v9").refused("'cpu:x86-64-v4'")
    cli("tune", "m.gopt").refused("m.gopt is compiled already")
    cli("tune", *MODEL, "--store", "/proc/no", "--budget", SECONDS).refused("cannot write /proc/no", code=1)
    cli("compile", TINY, "-o", "m.gopt", "--tune", "-1").refused("tuning for -1.0 seconds is not possible")
    cli("benchmark", "--suite", "folding", "--tune", "5").refused("no effect on --suite folding")
    cli("benchmark", "m.gopt", "--database", "s").refused("no effect on an artifact")
