"""`graphopt tune --rpc`: on devices of a tracker, and what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backends.tuner import remote
from tests.backends.tuner import rpc_servers
from tests.backends.tuner.rpc_servers import KEY
from tests.tools.conftest import DYNAMIC, TINY, Cli

MODEL = (TINY, "--dynamic", DYNAMIC, "--threads", "1")
PATIENCE = 3600.0  # seconds, on a machine that others use: small spaces end sooner


def test_options_that_belong_together(cli: Cli) -> None:
    cli("tune", *MODEL, "--rpc", "127.0.0.1:1").refused("--rpc has no effect without --key KEY; give both or neither")
    cli("tune", *MODEL, "--key", KEY).refused("--key has no effect without --rpc HOST:PORT; give both or neither")
    cli("tune", "--list", "--key", KEY).refused("--key has no effect without MODEL")
    cli("tune", *MODEL, "--rpc", "board", "--key", KEY).refused(
        "'board' is no address of an RPC tracker; give HOST:PORT"
    )


@pytest.mark.slow
def test_tuning_and_no_device_any_more(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rpc_servers.need_tracker()
    monkeypatch.setattr("graphopt.backends.choice.MOST_CANDIDATES", 4)
    monkeypatch.setattr(remote, "SECONDS", PATIENCE)
    with rpc_servers.tracker() as tracker:
        words = ("tune", *MODEL, "--store", "s", "--rpc", str(tracker.address), "--key", KEY)
        with rpc_servers.server(tracker.address) as server:
            outcome = cli(*words, "--budget", str(PATIENCE))
            assert outcome.code == 0, outcome.err
            assert outcome.out.splitlines()[3].endswith(f"kept in {Path('s').resolve()}")
            listed = cli("tune", "--list", "--store", "s", "--json").json["records"]
            own = [each["provenance"]["server"] for each in listed if not each["shipped"]]
            assert own == [str(server.address)]
        cli(*words).refused(f"no device has the key '{KEY}' at {tracker.address}, nor any other")
