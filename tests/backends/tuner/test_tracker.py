"""What is said where the tracker, its address or the key of the devices is wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from graphopt.backends.target import resolve_target
from graphopt.backends.tuner import tracker as trackers
from graphopt.backends.tuner.measuring import DeviceLostError
from graphopt.backends.tuner.remote import find_devices
from graphopt.backends.tuner.tracker import Address, Tracker
from graphopt.errors import UsageError
from tests.backends.tuner import rpc_servers
from tests.backends.tuner.rpc_servers import KEY

TARGET = resolve_target("cpu", 1)


@pytest.fixture(scope="module")
def tracker() -> Iterator[Address]:
    rpc_servers.need_tracker()
    with rpc_servers.tracker() as found:
        yield found.address


@pytest.mark.parametrize("text", ["", "board", "board:", ":9190", "board:port", "board:0", "board:65536", "board:-1"])
def test_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no address of an RPC tracker; give HOST:PORT, such as"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["board:9190", "10.0.0.7:1", "[::1]:65535"])
def test_addresses_are_written_as_they_are_read(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UsageError, match=f"no RPC tracker answers at 127.0.0.1:{port} .* --port {port}"):
        find_devices(f"127.0.0.1:{port}", KEY, TARGET)


def test_no_such_host() -> None:
    with pytest.raises(UsageError, match=r"no RPC tracker answers at no-such-host.invalid:9190 .*give its HOST:PORT"):
        find_devices("no-such-host.invalid:9190", KEY, TARGET)


def test_who_listens_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UsageError, match=f"what listens at 127.0.0.1:{port} is no RPC tracker"):
            find_devices(f"127.0.0.1:{port}", KEY, TARGET)


def test_a_server_is_no_tracker_and_other_keys_are_named(tracker: Address) -> None:
    with pytest.raises(UsageError, match=f"no device has the key 'other' at {tracker}, nor any other;.*--key other"):
        find_devices(str(tracker), "other", TARGET)
    with rpc_servers.server(tracker) as server:
        with pytest.raises(UsageError, match=f"what listens at {server.address} is no RPC tracker"):
            find_devices(str(server.address), KEY, TARGET)
        with pytest.raises(UsageError, match=f"no device has the key 'other' at {tracker}, only {KEY};"):
            find_devices(str(tracker), "other", TARGET)
        found = Tracker(tracker, KEY)
        assert found.servers() == [server.address] and found.acquire(server.address, lambda: True)
        server.kill()
        with pytest.raises(DeviceLostError, match=f"{server.address} has left the tracker"):
            found.acquire(server.address, lambda: True)


def test_a_device_that_others_keep(tracker: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    with rpc_servers.server(tracker) as server:
        other, found = Tracker(tracker, KEY), Tracker(tracker, KEY)
        assert other.acquire(server.address, lambda: True)
        monkeypatch.setattr(trackers, "_WAIT", 0.1)
        with pytest.raises(DeviceLostError, match=f"{server.address} was busy for others"):
            found.acquire(server.address, lambda: True)


def test_each_gets_the_device_it_asks_for(tracker: Address) -> None:
    with rpc_servers.server(tracker) as one, rpc_servers.server(tracker) as two:
        found = Tracker(tracker, KEY)
        keys = {found.acquire(each, lambda: True) for each in (two.address, one.address)}
        assert len(keys) == 2
