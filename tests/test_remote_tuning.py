"""Tuning on two devices of a tracker on loopback, of which one or both are killed: nothing that was found is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import graphopt
from graphopt.backends.tuner import remote
from graphopt.backends.tuner.measuring import DeviceLostError, Race, Times
from graphopt.backends.tuner.record import Record
from graphopt.backends.tuner.remote import RemoteMeasurer
from graphopt.backends.tuner.store import Store
from graphopt.backends.tuner.tracker import Address
from graphopt.tuning import tune
from tests import models
from tests.backends.tuner import rpc_servers
from tests.backends.tuner.rpc_servers import KEY, Listening

PATIENCE = 3600.0  # seconds, on a machine that others use: small spaces end sooner
LONGEST = 300.0  # seconds until the first record
RACE = RemoteMeasurer.race

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    rpc_servers.need_tracker()
    monkeypatch.setattr("graphopt.backends.choice.MOST_CANDIDATES", 4)
    monkeypatch.setattr(remote, "SECONDS", PATIENCE)
    with rpc_servers.tracker() as found:
        yield found


@pytest.fixture
def servers(tracker: Listening) -> Iterator[tuple[Listening, Listening]]:
    with rpc_servers.server(tracker.address) as one, rpc_servers.server(tracker.address) as two:
        yield one, two


class Watched(Store):
    """Holds every record against the device that its thread has raced on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.devices: dict[int, Address] = {}  # of the last race, by thread

    def append(self, record: Record) -> None:
        assert record.provenance["server"] == str(self.devices[threading.get_ident()])
        super().append(record)


def watch(store: Watched, monkeypatch: pytest.MonkeyPatch, before: Callable[[Address, int], None]) -> None:
    """`before(address, number)` is called before each race on a device."""
    counts: dict[Address, int] = {}

    def race(self: RemoteMeasurer, race: Race, limit: float) -> list[Times]:
        counts[self._address] = counts.get(self._address, 0) + 1
        before(self._address, counts[self._address])
        found = RACE(self, race, limit)
        store.devices[threading.get_ident()] = self._address
        return found

    monkeypatch.setattr(RemoteMeasurer, "race", race)


def kill_in_session(server: Listening) -> threading.Thread:
    """As soon as a session runs there."""

    def kill() -> None:
        while server.running and not server.sessions():
            pass
        server.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_device_that_is_killed_costs_nothing_that_was_found(
    tracker: Listening, servers: tuple[Listening, Listening], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, two = Watched(tmp_path), servers[1]
    killers: list[threading.Thread] = []

    def before(address: Address, number: int) -> None:
        if address == two.address and number == 2:
            killers.append(kill_in_session(two))
        elif address == two.address and number > 2:
            two.kill()

    watch(store, monkeypatch, before)
    program = models.program("mlp")
    outcome = tune(program, seconds=PATIENCE, database=store, threads=1, rpc=(str(tracker.address), KEY))
    killers[0].join()
    assert [failure for failure in outcome.failures if f"{two.address} has left the tracker" in failure]
    assert len(outcome.rows) > 1 and all(row.tried == row.space > 1 and row.new for row in outcome.rows)
    assert {record.workload for record in store.records()} == {row.workload for row in outcome.rows}
    assert {record.hardware.threads for record in store.records()} == {1}
    tuned = {kernel for row in outcome.rows if row.seconds != row.default_seconds for kernel in row.kernels}
    assert set(graphopt.compile(program, database=tmp_path, threads=1).report["tuned"]) == tuned


def test_all_devices_killed_and_tuning_again(
    tracker: Listening, servers: tuple[Listening, Listening], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Watched(tmp_path)
    by_address = {each.address: each for each in servers}

    def before(address: Address, number: int) -> None:
        end = time.monotonic() + LONGEST
        while address == servers[1].address and not store.records() and time.monotonic() < end:
            time.sleep(0.05)  # so that work is left when the first record is there
        if store.records():
            by_address[address].kill()

    watch(store, monkeypatch, before)
    program, rpc = models.program("mlp"), (str(tracker.address), KEY)
    with pytest.raises(DeviceLostError, match=r"no device is left, 127.* has left the tracker; start its server"):
        tune(program, seconds=PATIENCE, database=store, threads=1, rpc=rpc)
    kept = Store(tmp_path).records()
    assert kept

    watch(store, monkeypatch, lambda address, number: None)
    with rpc_servers.server(tracker.address):
        outcome = tune(program, seconds=PATIENCE, database=store, threads=1, rpc=rpc)
    assert all(row.tried == row.space for row in outcome.rows) and store.records()[: len(kept)] == kept
    assert {row.workload for row in outcome.rows if not row.new} == {record.workload for record in kept}
