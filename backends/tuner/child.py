"""A child process that answers requests one after the other, and is replaced when it crashes or hangs.

What it runs is code that was just generated: whatever becomes of it costs that one request. A request and its answer
are a JSON value and blobs of bytes. A child that its parent left behind ends when its request's time is over.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import graphopt
from graphopt.errors import GraphoptError

Blob = bytes | bytearray | memoryview
Answer = tuple[Any, list[Blob]]
Function = Callable[[Any, list[Blob]], tuple[Any, Sequence[Blob]]]

_START = "import sys; sys.path[:0] = sys.argv[1:2]; from graphopt.backends.tuner.child import main; main(*sys.argv[2:])"
_HEAD = struct.Struct("<QQ")  # bytes of the JSON value, number of blobs
_LENGTH = struct.Struct("<Q")
_STARVED = 5.0  # times as long as it should take a child may wait for a CPU
_POLL = 0.2  # seconds
_GRACE = 2.0  # seconds that a child has beyond its time before it ends itself
_LONGEST = 300  # characters of what a child said last


class ChildError(GraphoptError):
    """A child crashed, hung, ran out of memory or refused its request."""


class Child:
    """The process that runs `function` ("module:name") for each request; it starts with the first one.

    `memory` is how many bytes of data it may have; `starved` is how many times as long as it should take it may wait
    for a CPU, 1 where what it waits for is no CPU of this machine.
    """

    def __init__(self, function: str, memory: int, starved: float = _STARVED) -> None:
        self._function, self._memory, self._starved = function, memory, starved
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, value: Any, blobs: Sequence[Blob], seconds: float) -> Answer:
        """The answer. Raises ChildError when there is none within `seconds`; the next request has a new child.

        On a machine that others use the seconds are those that the child computes, up to `starved` times as many.
        """
        process = self._started()
        try:
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError):  # that there is no answer says what happened
                _write(process.stdin, {"seconds": self._starved * seconds + _GRACE, "value": value}, blobs)
            answer, found = _read(_Waiting(process.pid, process.stdout.fileno(), seconds, self._starved).read)
        except TimeoutError as e:
            self.close()
            raise ChildError(f"it took over {seconds:.0f} s") from e
        except EOFError as e:
            reason = self._ended(process, seconds)
            self.close()
            raise ChildError(reason) from e
        except BaseException:  # an interrupt leaves half a message behind
            self.close()
            raise
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer["value"], found

    def kill(self) -> None:
        """End the process and those it started; another thread may be waiting for its answer."""
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """The same, and nothing is left of it."""
        self.kill()
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError), self._process:
            pass
        self._process = None
        self._log.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            package = str(Path(graphopt.__file__).resolve().parents[1])
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, package, self._function, str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is the parent's, which ends the child and its own children together
            )
        return self._process

    def _ended(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        code = process.wait()
        if code == -signal.SIGALRM:
            return f"it took over {seconds:.0f} s"
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        said = f": {words[-1].strip()[:_LONGEST]}" if words else ""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}{said}"


class _Waiting:
    """Reads from a process's pipe for so many seconds.

    Raises TimeoutError, and EOFError where the other end is closed.
    """

    def __init__(self, process: int, descriptor: int, seconds: float, starved: float) -> None:
        self._process, self._descriptor, self._seconds, self._starved = process, descriptor, seconds, starved
        self._begin, self._used = time.monotonic(), _computed(process)

    def read(self, count: int) -> bytearray:
        found = bytearray(count)
        view = memoryview(found)
        while view:
            left = max(self._begin + self._seconds - time.monotonic(), _POLL)
            if not select.select([self._descriptor], [], [], left)[0]:
                self._check()
                continue
            got = os.readv(self._descriptor, [view])
            if not got:
                raise EOFError
            view = view[got:]
        return found

    def _check(self) -> None:
        waited = time.monotonic() - self._begin
        computed = min(waited, _computed(self._process) - self._used)
        if waited >= self._starved * self._seconds or computed >= self._seconds:
            raise TimeoutError


def _computed(process: int) -> float:
    """Seconds of CPU time of all its threads and of children that have ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


def _write(stream: IO[bytes], value: Any, blobs: Sequence[Blob]) -> None:
    views = [memoryview(blob).cast("B") for blob in blobs]
    text = json.dumps(value).encode()
    stream.write(_HEAD.pack(len(text), len(views)) + b"".join(_LENGTH.pack(len(view)) for view in views) + text)
    for view in views:
        stream.write(view)
    stream.flush()


def _read(read: Callable[[int], bytes | bytearray]) -> Answer:
    length, count = _HEAD.unpack(read(_HEAD.size))
    lengths = [_LENGTH.unpack(read(_LENGTH.size))[0] for _ in range(count)]
    value = json.loads(read(length))
    return value, [read(each) for each in lengths]


def main(function: str, memory: str) -> None:
    """The child: answers until its parent closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no answer
    sys.path[:] = [entry for entry in sys.path if entry]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), resource.RLIM_INFINITY))
    module, _, name = function.partition(":")
    run: Function = getattr(importlib.import_module(module), name)

    def whole(count: int) -> bytes:
        found = requests.read(count)
        if len(found) < count:
            raise EOFError
        return found

    with contextlib.suppress(EOFError):
        while True:
            request, blobs = _read(whole)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # the signal ends the process, whatever it does
            try:
                value, found = run(request["value"], blobs)
                answer: tuple[Any, Sequence[Blob]] = ({"value": value}, found)
            except Exception as e:
                lines = str(e).strip().splitlines() or [""]
                answer = ({"error": f"{type(e).__name__}: {lines[-1][:_LONGEST]}"}, [])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(answers, *answer)
