from __future__ import annotations

import graphopt
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
