"""Races on devices of a tracker on loopback: what is right, wrong, hangs, or takes the device with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from graphopt.backends.target import resolve_target
from graphopt.backends.tuner import machine, remote
from graphopt.backends.tuner.bench import Bench
from graphopt.backends.tuner.building import Builder
from graphopt.backends.tuner.measuring import DeviceLostError, Entrant, MeasureError, Race, Times
from graphopt.backends.tuner.remote import RemoteDevice, find_devices
from graphopt.errors import UsageError
from tests.backends.tuner import rpc_servers
from tests.backends.tuner.faults import Kind, workpiece
from tests.backends.tuner.rpc_servers import KEY, Listening

TARGET = resolve_target("cpu", 1)
PATIENCE = 600.0  # seconds, on a machine that others use


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    found = Builder(TARGET)
    yield found
    found.close()


@pytest.fixture(scope="module")
def tracker() -> Iterator[Listening]:
    rpc_servers.need_tracker()
    with rpc_servers.tracker() as found:
        yield found


@pytest.fixture
def server(tracker: Listening) -> Iterator[Listening]:
    with rpc_servers.server(tracker.address) as found:
        yield found


@pytest.fixture
def device(tracker: Listening, server: Listening, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteDevice]:
    monkeypatch.setattr(remote, "SECONDS", PATIENCE)
    (found,), lost = find_devices(str(tracker.address), KEY, TARGET)
    assert found.address == server.address and not lost
    yield found
    found.close()


@pytest.fixture
def bench(builder: Builder, device: RemoteDevice) -> Bench:
    return Bench(TARGET, builder, device.measurer, cold_bytes=1 << 20, beside=device.kernels)


def entrants(bench: Bench, *names: str) -> list[Entrant]:
    found = bench.build(workpiece(TARGET, *names), [Kind(name) for name in ("default", *names)])
    assert not [each for each in found if isinstance(each, str)]
    return [each for each in found if isinstance(each, Entrant)]


def test_races_and_what_a_device_says_of_itself(bench: Bench, device: RemoteDevice) -> None:
    default, same, wrong = bench.race(entrants(bench, "same", "plus_two"), 2, 0.001, 0.001)
    assert isinstance(default, Times) and isinstance(same, Times) and isinstance(wrong, Times)
    assert same.difference == 0 and wrong.difference > 0.1
    assert [len(turns) for turns in same.seconds] == [2] and np.min(same.seconds) > 0

    here = machine.this_hardware(TARGET.name, TARGET.threads)
    assert device.hardware == here
    about, own = device.provenance(), machine.provenance()
    assert about["server"] == str(device.address) and about["device"] == own["device"] and about["tvm"] == own["tvm"]


@pytest.mark.slow
def test_a_crash_takes_the_server_with_it(bench: Bench, device: RemoteDevice) -> None:
    """TVM's server listens no more when one of its sessions crashed."""
    found = entrants(bench, "crash")
    with pytest.raises(DeviceLostError, match=f"{device.address} has left the tracker"):
        bench.race(found, 1, 0.001, 0.001)
    with pytest.raises(DeviceLostError):
        bench.race(found[:1], 1, 0.001, 0.001)


def test_a_hang_costs_one_candidate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends the session, and takes the next."""
    default, hang, same = entrants(bench, "hang", "same")
    bench.race([default], 1, 0.001, 0.001)  # the child has started
    monkeypatch.setattr(remote, "SECONDS", 5.0)
    with pytest.raises(MeasureError, match=r"expired|took over"):
        bench.measurer.race(Race([default, hang], bench._support_library(), 1, 1, 0.001, 1 << 20), 1.0)
    monkeypatch.setattr(remote, "SECONDS", PATIENCE)
    assert all(isinstance(each, Times) for each in bench.race([default, same], 1, 0.001, 0.001))


def test_a_killed_server_is_lost(bench: Bench, device: RemoteDevice, server: Listening) -> None:
    found = entrants(bench)
    server.kill()
    with pytest.raises(DeviceLostError, match=f"{server.address} has left the tracker"):
        bench.race(found, 1, 0.001, 0.001)


@pytest.mark.slow
def test_devices_that_cannot_be_used(tracker: Listening, server: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SECONDS", PATIENCE)
    with pytest.raises(UsageError, match=r"on 1 threads and they are cut for 2; start it with TVM_NUM_THREADS=2"):
        find_devices(str(tracker.address), KEY, replace(TARGET, threads=2))
    strange = replace(TARGET, features=(*TARGET.features, "flags-of-tomorrow"))
    with pytest.raises(UsageError, match=f"for {TARGET.name} on {server.address}: it lacks flags-of-tomorrow"):
        find_devices(str(tracker.address), KEY, strange)
