"""Asking TVM's RPC tracker: which devices there are, and whose turn it is to use one.

A server gives the tracker a key that opens one session, and the tracker gives it to whoever asked first. Which of
several devices one gets is the tracker's choice, so keys of devices that another of our threads waits for are kept for
it. Every answer is waited for so many seconds only.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.backends.tuner.measuring import DeviceLostError
from graphopt.errors import UsageError
from graphopt.runtime.library import hidden

with hidden("torch"):
    from tvm.rpc import base

_ANSWER = 5.0  # seconds that a tracker may take
_WAIT = 30.0  # seconds that others may keep a device busy
_POLL = 0.2
_FRESH = 6.0  # seconds after which a server withdraws a key that nobody used
_SETTLE = 0.5  # seconds in which a tracker hears that a server is gone


@dataclass(frozen=True)
class Address:
    """Where a tracker or a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From "host:port", an IPv6 host in brackets. Raises UsageError."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UsageError(f"{text!r} is no address of an RPC tracker; give HOST:PORT, such as 192.168.1.10:9190")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Tracker:
    """The tracker at `address`, for devices that its servers call `key`.

    Raises UsageError where none answers there, or it knows no such device.
    """

    def __init__(self, address: Address, key: str) -> None:
        self.address, self.key = address, key
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None  # with one request that is not answered yet
        self._kept: dict[Address, tuple[str, float]] = {}
        if not self.servers():
            known = sorted({item["key"].removeprefix("server:") for item in self._summary()["server_info"]})
            others = f"only {', '.join(known)}" if known else "nor any other"
            raise UsageError(
                f"no device has the key {key!r} at {address}, {others}; "
                f"give its --key, or start: python -m tvm.exec.rpc_server --tracker {address} --key {key}"
            )

    def servers(self) -> list[Address]:
        """Every device of the key, free or not."""
        found = [item["addr"] for item in self._summary()["server_info"] if item["key"] == f"server:{self.key}"]
        return sorted((Address(host, port) for host, port in found), key=lambda each: (each.host, each.port))

    def acquire(self, server: Address, wanted: Callable[[], bool]) -> str:
        """The key for one session with this server.

        Raises DeviceLostError where it is gone, others keep it, or it is not wanted any more.
        """
        end = time.monotonic() + _WAIT
        try:
            while wanted() and time.monotonic() < end:
                with self._lock:
                    key, since = self._kept.pop(server, ("", 0.0))
                    if key and time.monotonic() - since < _FRESH:
                        return key
                    self._check(server)
                    if (found := self._requested()) is not None:
                        self._kept[found[0]] = found[1], time.monotonic()
        except DeviceLostError:
            self.close()
            raise
        self.close()
        raise DeviceLostError(f"{server} was busy for others for {_WAIT:.0f} s")

    def check(self, server: Address) -> None:
        """After a session that broke: raises DeviceLostError where the server went with it."""
        end = time.monotonic() + _SETTLE
        while time.monotonic() < end:
            self._check(server)
            time.sleep(_POLL)

    def close(self) -> None:
        """Take back a request that has no answer yet."""
        with self._lock:
            self._end_request()

    def _check(self, server: Address) -> None:
        try:
            known = self.servers()
        except UsageError as e:
            raise DeviceLostError(f"{server} is out of reach: {e}") from e
        if server not in known:
            raise DeviceLostError(f"{server} has left the tracker")

    def _summary(self) -> Any:
        with self._connected() as connection:
            return self._asked(connection, base.TrackerCode.SUMMARY)

    def _requested(self) -> tuple[Address, str] | None:
        """Any device of the key that is free; the request stays where there is none yet."""
        try:
            if self._requests is None:
                self._requests = self._connected()
                base.sendjson(self._requests, [base.TrackerCode.REQUEST, self.key, "", 1])
            if not select.select([self._requests], [], [], _POLL)[0]:
                return None
            code, (host, port, key) = base.recvjson(self._requests)
        except (OSError, ValueError, TypeError, struct.error):
            code = None
        self._end_request()
        return (Address(host, port), key) if code == base.TrackerCode.SUCCESS else None

    def _end_request(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    def _asked(self, connection: socket.socket, *question: Any) -> Any:
        try:
            base.sendjson(connection, question)
            code, answer = base.recvjson(connection)
        except (OSError, ValueError, TypeError, struct.error) as e:
            raise self._silent(e) from e
        if code != base.TrackerCode.SUCCESS:
            raise self._silent(RuntimeError(f"code {code}"))
        return answer

    def _connected(self) -> socket.socket:
        try:
            connection = socket.create_connection((self.address.host, self.address.port), _ANSWER)
        except OSError as e:
            raise self._silent(e) from e
        try:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            found = struct.unpack("<i", base.recvall(connection, 4))[0]
        except (OSError, struct.error):
            found = None
        if found != base.RPC_TRACKER_MAGIC:
            connection.close()
            raise UsageError(f"what listens at {self.address} is no RPC tracker; give the tracker's HOST:PORT")
        return connection

    def _silent(self, reason: Exception) -> UsageError:
        said = getattr(reason, "strerror", None) or str(reason)
        return UsageError(
            f"no RPC tracker answers at {self.address} ({said}); give its HOST:PORT, "
            f"or start: python -m tvm.exec.rpc_tracker --port {self.address.port}"
        )
