"""The child that talks to a device: one session with a TVM RPC server for every request, and what is run in it.

The server has nothing but TVM. Libraries are sent to it, and its memory is filled there; what comes back are results of
one call and the times of turns. A session that lasts too long the server ends itself, whatever runs in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from graphopt.backends.tuner.child import Blob
from graphopt.backends.tuner.measuring import Argument, Race, Times
from graphopt.backends.tuner.race_memory import FLOATS, Memory, drawn, viewed, words_of
from graphopt.backends.tuner.race_message import pack_times, unpack_race
from graphopt.backends.tuner.racing import LEAST_CALLS, difference
from graphopt.backends.tuner.remote_kernels import FILL, PAGE, READ, place_words, timed, words
from graphopt.runtime.library import hidden
from graphopt.runtime.session import SET_DENORMALS
from graphopt.runtime.tensors import widen
from graphopt.turns import in_turns

with hidden("torch"):
    import tvm
    from tvm import rpc

_MOST_CALLS = 1000  # of a turn
_DRAWN = 1 << 16  # values that cold memory repeats
_BIG_CORES = 1  # TVM's mode in which its pool is made
_BLOCK = 1 << 16  # bytes of a file that are read at once


def serve(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    """value: {"server": [host, port, key], "seconds": limit, "threads": number} and what is asked for.

    {"race": a packed race, "cold_bytes": of the device} gives packed times. {"paths": files, "library": the blob of
    `READ`} gives which of them are there, and their contents as blobs. Both are under "found"; in its place stands
    "refused" where no session could be had, or "unusable", and why. Nothing is asked of a child that is to start only.
    """
    if not value:
        return {}, []
    try:
        remote = rpc.connect(*value["server"], session_timeout=value["seconds"])
    except Exception as e:
        return {"refused": (str(e).strip().splitlines() or [type(e).__name__])[-1]}, []
    threads = value["threads"]
    remote.get_function("runtime.config_threadpool")(_BIG_CORES, threads)
    if (found := remote.get_function("runtime.NumThreads")()) != threads:
        reason = f"its server runs kernels on {found} threads and they are cut for {threads}"
        advice = f"start it with TVM_NUM_THREADS={threads} in its environment, or give --threads {found}"
        return {"unusable": f"{reason}; {advice}"}, []
    if "race" in value:
        return {"found": pack_times(run_race(remote, unpack_race(value["race"], blobs), value["cold_bytes"]))}, []
    return read_files(remote, value["paths"], bytes(blobs[0]))


def read_files(remote: Any, paths: Sequence[str], library: bytes) -> tuple[Any, list[Blob]]:
    """The server's own functions cannot read files that have no size, as those of /proc."""
    read = _load(remote, "read", library).get_function(READ)
    device = remote.cpu()
    data, count = tvm.runtime.empty((_BLOCK,), "int8", device), tvm.runtime.empty((1,), "int64", device)
    contents: list[Blob | None] = []
    for path in paths:
        name, content = _put(np.frombuffer(path.encode() + b"\0", np.int8), device), bytearray()
        while True:
            read(name, data, len(content), count)
            if (got := int(count.numpy()[0])) <= 0:
                break
            content += data.numpy()[:got].tobytes()
        contents.append(content if got == 0 else None)
    found = [content for content in contents if content is not None]
    return {"found": [content is not None for content in contents]}, found


def run_race(remote: Any, race: Race, cold_bytes: int) -> list[Times]:
    """As `racing.run_race` does it here, with cold weights all over `cold_bytes` of the device's memory."""
    support = _load(remote, "support", race.support)
    loaded = [_load(remote, f"entrant{number}", entrant.library) for number, entrant in enumerate(race.entrants)]
    support.get_function(SET_DENORMALS)(1, race.threads)
    memory = _DeviceMemory(remote.cpu(), loaded[0].get_function(FILL), Memory(race), cold_bytes)
    runs = [
        [_Run(module.get_function(timed(number)), number, case, memory) for number, case in enumerate(entrant.cases)]
        for module, entrant in zip(loaded, race.entrants, strict=True)
    ]
    wanted = [run.results() for run in runs[0]]
    apart = [difference([run.results() for run in each], wanted) for each in runs]
    for run in (run for each in runs for run in each):
        run.estimate()
    taken = iter(in_turns([partial(run.turn, race.seconds) for each in runs for run in each], race.turns))
    return [Times(tuple(tuple(next(taken)) for _ in each), apart) for each, apart in zip(runs, apart, strict=True)]


class _DeviceMemory:
    """Words in the device's memory; what is made for one entrant serves the others."""

    def __init__(self, device: Any, fill: Callable[..., None], memory: Memory, cold_bytes: int) -> None:
        self._device, self._fill, self._memory, self._cold_bytes = device, fill, memory, cold_bytes
        self._made: dict[Any, Any] = {}

    def numbers(self, count: int) -> Any:
        """int64 [count]."""
        return self._once(("numbers", count), lambda: tvm.runtime.empty((count,), "int64", self._device))

    def input(self, argument: Argument, case: int, place: int) -> Any:
        key = "input", case, place, argument.dtype, argument.shape
        return self._once(key, lambda: _put(self._memory.input(argument, case, place), self._device))

    def output(self, argument: Argument, case: int, place: int) -> Any:
        """NaN in every type of floats."""
        tensor = self._once(("output", case, place, words(argument)), lambda: self._empty(words(argument)))
        self._fill(tensor, self._once("nan", lambda: _put(np.full(1, -1, np.int32), self._device)))
        return tensor

    def weight(self, argument: Argument) -> Any:
        """The model's own."""
        assert argument.values is not None

        def made() -> Any:
            found = words_of(argument)
            viewed(found, argument)[...] = argument.values
            return _put(found, self._device)

        return self._once(("weight", id(argument.values)), made)

    def cold(self, argument: Argument) -> Any:
        """Places for a weight of floats, all over; the model's own for integers, which may be indices."""
        if argument.dtype not in FLOATS:
            return self.weight(argument)
        size = max(place_words(argument), -(-self._cold_bytes // PAGE) * PAGE // 4)

        def made() -> Any:
            source = _put(drawn(Argument("weight", argument.dtype, (_DRAWN,)), (0,)), self._device)
            tensor = self._empty(size)
            self._fill(tensor, source)
            return tensor

        return self._once(("cold", argument.dtype, size), made)

    def _empty(self, count: int) -> Any:
        return tvm.runtime.empty((count,), "int32", self._device)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(eq=False)
class _Run:
    """One entrant in one case."""

    function: Callable[..., None]
    number: int
    case: Sequence[Argument]
    memory: _DeviceMemory

    def __post_init__(self) -> None:
        self._seconds, self._calls = 0.0, 0
        self._cold = self._arrays(self.memory.cold)

    def results(self) -> list[np.ndarray]:
        """Of one call with the model's weights."""
        arrays = self._arrays(self.memory.weight)
        self.function(*arrays.values(), self.memory.numbers(1), 0, 0)
        found = []
        for place, argument in enumerate(self.case):
            if argument.role == "output":
                found.append(widen(viewed(arrays[place].numpy(), argument), argument.dtype).copy())
        return found

    def estimate(self) -> None:
        """How long a call takes, so that a turn can be one message."""
        self._seconds = self._timed(LEAST_CALLS)

    def turn(self, seconds: float) -> float:
        """As `racing` has it: the time that a quarter of the calls do not exceed."""
        return self._timed(min(_MOST_CALLS, max(LEAST_CALLS, math.ceil(seconds / max(self._seconds, 1e-9)))))

    def _timed(self, calls: int) -> float:
        taken = self.memory.numbers(calls)
        self.function(*self._cold.values(), taken, self._calls, 0)
        self._calls += calls
        return float(sorted(taken.numpy())[(calls - 1) // 4]) * 1e-9

    def _arrays(self, weight: Callable[[Argument], Any]) -> Mapping[int, Any]:
        """In the order of the kernel's arguments."""
        found = {}
        for place, argument in enumerate(self.case):
            if argument.role == "weight":
                found[place] = weight(argument)
            elif argument.role != "size":
                make = self.memory.input if argument.role == "input" else self.memory.output
                found[place] = make(argument, self.number, place)
        return found


def _put(array: np.ndarray, device: Any) -> Any:
    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    tensor.copyfrom(np.ascontiguousarray(array))
    return tensor


def _load(remote: Any, name: str, library: bytes) -> Any:
    remote.upload(bytearray(library), f"{name}.so")
    return remote.load_module(f"{name}.so")
