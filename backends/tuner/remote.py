"""Devices that TVM's RPC tracker knows: kernels are built here, sent there, and measured one session at a time.

Each device answers for itself: what it is, is read from its own files, and all that is compared was measured on it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphopt.backends.target import LEVELS, Target
from graphopt.backends.tuner import building, machine
from graphopt.backends.tuner.child import Answer, Blob, Child, ChildError
from graphopt.backends.tuner.device import Feeds, seconds_here
from graphopt.backends.tuner.local import half_of_memory
from graphopt.backends.tuner.measuring import Case, DeviceLostError, MeasureError, Race, Times
from graphopt.backends.tuner.race_message import pack_race, unpack_times
from graphopt.backends.tuner.record import Hardware
from graphopt.backends.tuner.remote_kernels import READ, measuring_kernels, read_kernel
from graphopt.backends.tuner.tracker import Address, Tracker
from graphopt.errors import CompileError, UsageError
from graphopt.runtime.caches import CACHES, cache_sizes
from graphopt.runtime.features import read_features, read_text

SECONDS = 20.0  # that a session may take besides what runs in it
_START = 120.0  # seconds in which a child must answer, on a machine that others use
_BYTES_A_SECOND = 5 << 20  # over the network, at the least
_TRIES = 3  # to open a session with keys that the tracker gives
_CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"
_FILES = (
    *("/proc/cpuinfo", "/proc/self/status", "/proc/device-tree/model"),
    *(f"{_CPUFREQ}/{name}" for name in ("scaling_governor", "scaling_max_freq")),
    *(f"{CACHES}/index{number}/{name}" for number in range(5) for name in ("type", "level", "size")),
)
_OLDEST = {"x86_64": "cpu:x86-64-v3", "aarch64": "cpu:aarch64"}


class RemoteMeasurer:
    """Runs races on the server at `address`, in a child process, so that no server can hang us.

    `cold_bytes` of its memory hold a model's weights, as far as it has caches for them.
    """

    def __init__(self, tracker: Tracker, address: Address, threads: int, memory: int | None = None) -> None:
        self.cold_bytes = 0
        self._tracker, self._address, self._threads = tracker, address, threads
        self._child = Child("graphopt.backends.tuner.remote_racing:serve", memory or half_of_memory(), starved=1.0)
        self._busy = threading.Lock()
        self._closed = False

    def race(self, race: Race, limit: float) -> list[Times]:
        """As `Measurer` has it. Raises DeviceLostError where the device is gone, whatever its last race was."""
        value, blobs = pack_race(race)
        cold_bytes = min(race.cold_bytes, self.cold_bytes or race.cold_bytes)
        return unpack_times(self.ask({"race": value, "cold_bytes": cold_bytes}, blobs, limit)[0])

    def ask(self, value: Mapping[str, Any], blobs: Sequence[Blob], limit: float) -> Answer:
        """What `remote_racing.serve` finds. Raises MeasureError, DeviceLostError, UsageError for an unusable server."""
        seconds = limit + SECONDS + sum(memoryview(blob).nbytes for blob in blobs) / _BYTES_A_SECOND
        with self._busy:
            for _ in range(_TRIES):
                self._asked({}, [], _START)  # a child that has to start does so before the session does
                key = self._tracker.acquire(self._address, lambda: not self._closed)
                session = {"server": [self._address.host, self._address.port, key], "seconds": seconds}
                request = {**value, **session, "threads": self._threads}
                try:
                    answer, found = self._asked(request, blobs, seconds + SECONDS)
                except MeasureError:
                    self._tracker.check(self._address)
                    raise
                if "unusable" in answer:
                    raise UsageError(f"{self._address} cannot be tuned on: {answer['unusable']}")
                if "found" in answer:
                    return answer["found"], found
        raise DeviceLostError(f"{self._address} takes no session: {answer['refused']}")

    def _asked(self, value: Mapping[str, Any], blobs: Sequence[Blob], seconds: float) -> Answer:
        if self._closed:
            raise DeviceLostError(f"{self._address} is not used any more")
        try:
            return self._child.ask(value, blobs, seconds)
        except ChildError as e:
            raise MeasureError(str(e)) from e

    def close(self) -> None:
        """End the child, also one that another thread waits for."""
        self._closed = True
        self._child.kill()
        with self._busy:
            self._child.close()


class RemoteDevice:
    """The device at `address`, for code of `target`; `library` holds `READ`.

    Raises UsageError where it cannot run such code, or with so many threads; DeviceLostError.
    """

    def __init__(self, tracker: Tracker, address: Address, target: Target, library: bytes) -> None:
        self.address, self._target = address, target
        self.measurer = RemoteMeasurer(tracker, address, target.threads)
        self._files = tempfile.TemporaryDirectory(prefix="graphopt-device-")
        self._root = Path(self._files.name)
        try:
            self._read(library)
            self.hardware = self._described()
        except BaseException:
            self.close()
            raise

    def provenance(self) -> Mapping[str, str]:
        """Clocks are those it had when tuning began."""
        return machine.provenance(self._root) | {"server": str(self.address)}

    def kernels(self, function: str, cases: Sequence[Case]) -> Mapping[str, Any]:
        """As `Device` has it."""
        return measuring_kernels(function, cases, self._target)

    def kernel_seconds(self, artifact: Any, feeds: Feeds) -> Mapping[str, float]:
        """Those that the kernels take here: how many turns each gets needs no better."""
        return seconds_here(artifact, feeds, min(self._target.threads, len(os.sched_getaffinity(0))))

    def close(self) -> None:
        self.measurer.close()
        self._files.cleanup()

    def _read(self, library: bytes) -> None:
        try:
            found, contents = self.measurer.ask({"paths": _FILES}, [library], SECONDS)
        except MeasureError as e:
            reason = f"{self.address} runs no code for {self._target.machine} ({e})"
            raise UsageError(f"{reason}; give the --target that fits it") from e
        rest = iter(contents)
        for path in (path for path, there in zip(_FILES, found, strict=True) if there):
            place = self._root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(next(rest))

    def _described(self) -> Hardware:
        target = self._target
        features = read_features(read_text(self._root / "proc/cpuinfo")) | {target.machine}
        if lacking := ", ".join(name for name in target.features if name not in features):
            raise UsageError(f"nothing can be measured for {target.name} on {self.address}: it lacks {lacking}")
        available = _cpus(read_text(self._root / "proc/self/status"))
        if target.threads > available:
            reason = f"threads is {target.threads} and {self.address} may use {available} CPUs"
            raise UsageError(f"{reason}; give --threads {available} or fewer")
        self.measurer.cold_bytes = 2 * max(cache_sizes(self._root / str(CACHES).lstrip("/")).values())
        return Hardware(target.name, machine.instruction_sets(features), target.threads, machine.tvm_version())


def _cpus(status: str) -> int:
    """How many a process may use, by what the kernel says of it."""
    masks = [line.partition(":")[2] for line in status.splitlines() if line.startswith("Cpus_allowed:")]
    return sum(int(word, 16).bit_count() for word in "".join(masks).strip().split(",")) if masks else 1


def find_devices(address: str, key: str, target: Target) -> tuple[list[RemoteDevice], list[str]]:
    """All devices of this key that a tracker at "host:port" knows, and what became of those that do not answer.

    Raises UsageError where none answers, one cannot be used or is of another kind; it says what to write instead.
    """
    tracker = Tracker(Address.parse(address), key)
    servers = tracker.servers()
    library = _reading_library(target)

    def opened(server: Address) -> RemoteDevice | Exception:
        try:
            return RemoteDevice(tracker, server, target, library)
        except (UsageError, DeviceLostError) as e:
            return e

    with ThreadPoolExecutor(len(servers)) as threads:
        found = list(threads.map(opened, servers))
    devices = [each for each in found if isinstance(each, RemoteDevice)]
    lost = [str(each) for each in found if isinstance(each, DeviceLostError)]
    errors = [each for each in found if isinstance(each, UsageError)]
    errors += [_differing(devices[0], each, key) for each in devices if each.hardware != devices[0].hardware]
    if not devices and not errors:
        errors.append(UsageError(f"no device of the key {key!r} answers: {'; '.join(lost)}; start its server again"))
    if errors:
        for each in devices:
            each.close()
        raise errors[0]
    return devices, lost


def _differing(one: RemoteDevice, other: RemoteDevice, key: str) -> UsageError:
    apart = ", ".join(sorted(set(one.hardware.features) ^ set(other.hardware.features)))
    return UsageError(
        f"{one.address} and {other.address} are of two kinds, they differ in {apart}; "
        f"start their servers with a key for each kind instead of {key!r}"
    )


def _reading_library(target: Target) -> bytes:
    """For any device of this kind of machine, which `target` may not fit."""
    architecture, features = LEVELS[_OLDEST[target.machine]]
    builder = building.Builder(replace(target, architecture=architecture, features=features, extensions=()))
    try:
        (built,) = builder.build([{READ: read_kernel()}])
    finally:
        builder.close()
    if isinstance(built, str):
        raise CompileError(f"nothing can be built for {target.name}: {built}")
    return built
