"""One side runs while the processes of all others are stopped: a spinning thread pool slows its neighbour."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.tools.array_file import save_arrays
from graphopt.tools.benchmarking.usage import Interference, interference, read_usage

TURN = 0.2  # seconds, the least a turn takes
ALONE = 0.5  # seconds without a pause; PARTS + 1 such blocks a side, spread over the whole time
PARTS = 3
DRIFT = 0.05  # a side whose median in turns is further than this from its median alone was disturbed

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Entrant:
    """One side and the file it runs."""

    side: str
    model: str


@dataclass
class Measurement:
    """All times in seconds; `outputs` are those of the first call."""

    side: str
    about: dict[str, Any]
    load_seconds: float
    peak_bytes: int
    outputs: list[np.ndarray[Any, Any]]
    turns: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.turns)

    @property
    def median_alone(self) -> float:
        return median(self.alone)

    @property
    def valid(self) -> bool:
        """The turns did not disturb this side."""
        return abs(self.median / self.median_alone - 1) <= DRIFT


class Side:
    """A side's process; stopped except while `measure` waits for it."""

    def __init__(self, entrant: Entrant, inputs: Path, outputs: Path, cores: Sequence[int]) -> None:
        self.name = entrant.side
        self.outputs = outputs
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "TVM_NUM_THREADS": str(len(cores))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "graphopt.tools.benchmarking.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # the process and its own children are stopped together
        )
        configuration = {"side": entrant.side, "model": entrant.model, "inputs": str(inputs)}
        self.send({**configuration, "outputs": str(outputs), "cores": list(cores)})

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass

    def send(self, value: Any) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says what happened
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise GraphoptError(f"{self.name} ended with code {self.process.wait()} while it was measured")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise GraphoptError(f"{self.name} cannot run this model: {value['error']}")
        return value

    def opened(self) -> Measurement:
        """Wait until the side is open and warm, then stop it."""
        answer = self.receive()
        self.stop()
        with np.load(self.outputs) as arrays:
            outputs = [arrays[name] for name in arrays.files]
        return Measurement(self.name, answer["about"], answer["load_seconds"], answer["peak_bytes"], outputs)

    def measure(self, seconds: float) -> list[float]:
        """Seconds of each call of one turn."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.send({"seconds": seconds})
        times: list[float] = self.receive()
        self.stop()
        return times

    def stop(self) -> None:
        """Returns when no thread of the side runs any more."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def take_turns(
    entrants: Sequence[Entrant],
    feed: Arrays,
    cores: Sequence[int],
    rounds: int,
    turn: float = TURN,
    alone: float = ALONE,
) -> tuple[list[Measurement], Interference]:
    """Measure all entrants on the same feed and cores; raises GraphoptError when one cannot run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        inputs = Path(folder) / "inputs.npz"
        with open(inputs, "wb") as stream:
            save_arrays(stream, feed)
        sides: list[Side] = []
        results: list[Measurement] = []
        for number, entrant in enumerate(entrants):
            side = stack.enter_context(Side(entrant, inputs, Path(folder) / f"outputs_{number}.npz", cores))
            results.append(side.opened())
            results[-1].alone += side.measure(alone)
            sides.append(side)
        processes = [side.process.pid for side in sides]
        before = read_usage(cores, processes)
        for number, together in schedule(len(sides), rounds):
            if together:
                results[number].turns += sides[number].measure(turn)
            else:
                results[number].alone += sides[number].measure(alone)
        return results, interference(before, read_usage(cores, processes), cores)


def schedule(sides: int, rounds: int) -> Iterator[tuple[int, bool]]:
    """(side, whether it is a turn): rounds of turns, every other one backwards so that no side always follows the same
    one, and after every third of the rounds a block alone, so that a machine that slows down slows both alike."""
    ends = {rounds * part // PARTS for part in range(1, PARTS + 1)}
    for index in range(rounds):
        order = range(sides) if index % 2 == 0 else reversed(range(sides))
        yield from ((number, True) for number in order)
        if index + 1 in ends:
            yield from ((number, False) for number in range(sides))
