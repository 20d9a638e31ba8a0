"""TVM's RPC tracker and servers on loopback, in processes that end with the test, however it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.backends.tuner.tracker import Address, Tracker
from graphopt.errors import UsageError

KEY = "board"
_ENDS_WITH_ITS_PARENT = "print(state.port, flush=True); os.read(0, 1); os.killpg(0, signal.SIGKILL)"
_START = "import os, signal, sys; port = 20000 + os.getpid() % 20000; places = '127.0.0.1', port, port + 9000; "
_TRACKER = "from tvm.rpc.tracker import PopenTrackerServerState as State; state = State(*places, silent=True); "
_SERVER = (
    "from tvm.rpc.server import PopenRPCServerState as State; at = sys.argv[1], int(sys.argv[2]); "
    "state = State(*places, tracker_addr=at, key=sys.argv[3], silent=True); "
)


def need_tracker() -> None:
    """Skips the test where TVM's tracker cannot run, which fails in CI."""
    if importlib.util.find_spec("tornado") is None:
        assert not os.environ.get("CI"), "TVM's tracker needs tornado; pip install -e .[dev]"
        pytest.skip("TVM's tracker needs tornado")


class Listening:
    """One such process."""

    def __init__(self, program: str, *arguments: str, threads: int = 1) -> None:
        environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START + program + _ENDS_WITH_ITS_PARENT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=environment,
        )

    @property
    def address(self) -> Address:
        """Once it listens."""
        if not hasattr(self, "_address"):
            assert self._process.stdout
            self._address = Address("127.0.0.1", int(self._process.stdout.readline()))
        return self._address

    def sessions(self) -> list[int]:
        """Processes that serve somebody."""
        try:
            threads = list(Path(f"/proc/{self._process.pid}/task").glob("*/children"))
            return [int(child) for thread in threads for child in thread.read_text().split()]
        except OSError:
            return []

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """With -9, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()


@contextlib.contextmanager
def tracker() -> Iterator[Listening]:
    with contextlib.closing(Listening(_TRACKER)) as found:
        yield found


@contextlib.contextmanager
def server(at: Address, key: str = KEY, threads: int = 1) -> Iterator[Listening]:
    """Once the tracker knows it."""
    with contextlib.closing(Listening(_SERVER, at.host, str(at.port), key, threads=threads)) as found:
        while not _knows(at, key, found.address):
            assert found.running
            time.sleep(0.02)
        yield found


def _knows(at: Address, key: str, server: Address) -> bool:
    try:
        return server in Tracker(at, key).servers()
    except UsageError:
        return False
