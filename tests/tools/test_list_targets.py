from __future__ import annotations

from platform import machine

import pytest

import graphopt
from graphopt.backends import targets
from tests.tools.conftest import Cli


def test_every_target_says_what_is_missing(cli: Cli) -> None:
    rows = {row["target"]: row for row in cli("list-targets", "--json").json}
    assert set(rows) == set(graphopt.list_targets())
    assert (rows["cpu"]["build"], rows["cpu"]["run"], rows["cpu"]["tune"]) == ("yes", "yes", "yes")
    assert rows["cuda:sm_90"]["build"] == "yes" and rows["cuda:sm_90"]["GB"] == 141
    assert rows["jetson-thor"]["cuda"] == "sm_110" and "not tuned" in rows["cuda:sm_120"]["tune"]
    assert rows["jetson-nano"]["compiled as"] == "cpu:aarch64" and "driver is older" in rows["jetson-nano"]["note"]
    assert "asimd" in rows["raspberry-pi-5"]["features"]


def test_one_target(cli: Cli) -> None:
    assert cli("list-targets", "--target", "cpu").out.count("\n") == 3
    cli("list-targets", "--target", "cpuu").refused("unknown target 'cpuu'", "'cpu'")


def test_several_architectures_of_gpus(cli: Cli) -> None:
    (row,) = cli("list-targets", "--target", "cuda:sm_90+sm_80", "--json").json
    assert row["cuda"] == "sm_80+sm_90" and row["features"][-1] == "cuda:sm_80+sm_90"
    assert cli("list-targets", "--target", "cuda:sm_87", "--json").json[0]["cuda"] == "sm_87"


def test_code_for_a_gpu_takes_a_linker_for_its_host(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_cross_linker", lambda machine: None)
    other, here = ("cuda:sm_87", "jetson-orin-nx") if machine() == "aarch64" else ("jetson-orin-nx", "cuda:sm_87")
    (row,) = cli("list-targets", "--target", other, "--json").json
    assert "pip install ziglang" in row["build"] and row["cuda"] == "sm_87"
    assert "ziglang" not in cli("list-targets", "--target", here, "--json").json[0]["build"]
