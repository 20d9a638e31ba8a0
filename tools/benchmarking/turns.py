"""One side runs while the processes of all others are stopped: a spinning thread pool slows its neighbour."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.progress import tell
from graphopt.tools.array_file import save_arrays
from graphopt.tools.benchmarking.usage import Interference, interference, read_usage

TURN = 0.2  # seconds, the least a turn takes
ALONE = 0.5  # seconds without a pause; PARTS + 1 such blocks a side, spread over the whole time
PARTS = 3
SPARING_SECONDS = 15.0  # of turns, after which a side that is sparing sits out
LONGEST = 300  # characters of what a process said
PATIENCE = 900.0  # seconds a side may take to open its model, and for each turn
DRIFT = 0.05  # a side whose median in turns is further than this from its median alone was disturbed

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Entrant:
    """One side, the file it runs, and the name it goes by where that is not the side's.

    A sparing side may take a hundred times as long as others: it makes as few calls as can be, and its turns end early.
    """

    side: str
    model: str
    sparing: bool = False
    name: str = ""


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


@dataclass(frozen=True)
class Failure:
    """A side that could not be measured, and why."""

    side: str
    reason: str


class SideError(GraphoptError):
    """A side cannot open or run its model, or takes too long."""


class Side:
    """A side's process; stopped except while `measure` waits for it."""

    def __init__(
        self, entrant: Entrant, inputs: Path, outputs: Path, cores: Sequence[int], patience: float = PATIENCE
    ) -> None:
        self.name = entrant.name or entrant.side
        self.sparing = entrant.sparing
        self.patience = patience
        self.outputs = outputs
        self.answers = b""
        self.log = outputs.with_suffix(".log")
        scratch = outputs.with_suffix(".tmp")  # outlives a killed process only until our folder is removed
        scratch.mkdir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(len(cores)),
            "TVM_NUM_THREADS": str(len(cores)),
            "TMPDIR": str(scratch),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "graphopt.tools.benchmarking.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # the process and its own children are stopped together
            )
        configuration = {"side": entrant.side, "model": entrant.model, "inputs": str(inputs), "sparing": self.sparing}
        self.send({**configuration, "outputs": str(outputs), "cores": list(cores)})

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        with self.process:
            pass

    def kill(self) -> None:
        """The process keeps its entry in /proc, with the time it used, until this context ends."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def send(self, value: Any) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says what happened
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, doing: str) -> Any:
        line = self.read_line(doing)
        if not line:
            raise SideError(f"{self.name} ended with code {self.process.wait()} while {doing}{self.last_words()}")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise SideError(f"{self.name} cannot run this model: {value['error']}")
        return value

    def last_words(self) -> str:
        """What the process wrote to stderr before it ended, as the end of a sentence."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:LONGEST]}" if lines else ""

    def read_line(self, doing: str) -> bytes:
        """Empty when the process has ended."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        end = time.monotonic() + self.patience
        while b"\n" not in self.answers:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise SideError(f"{self.name} took over {self.patience:g} s while {doing}; --peer-timeout allows more")
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b""
            self.answers += part
        line, _, self.answers = self.answers.partition(b"\n")
        return line

    def opened(self) -> Measurement:
        """Wait until the side is open and warm, then stop it."""
        answer = self.receive("it opened its model")
        self.stop()
        with np.load(self.outputs) as arrays:
            outputs = [arrays[name] for name in arrays.files]
        return Measurement(self.name, answer["about"], answer["load_seconds"], answer["peak_bytes"], outputs)

    def measure(self, seconds: float) -> list[float]:
        """Seconds of each call of one turn."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.send({"seconds": seconds})
        times: list[float] = self.receive("it was measured")
        self.stop()
        return times

    def stop(self) -> None:
        """Returns when no thread of the side runs any more."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@dataclass
class Contest:
    """The sides that take part, what was measured of each, and which ones failed."""

    sides: list[Side] = field(default_factory=list)
    results: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    out: set[Side] = field(default_factory=set)

    def open(self, side: Side, alone: float) -> None:
        try:
            result = side.opened()
            result.alone += side.measure(alone)
        except SideError as e:
            self.fail(side, e)
            return
        self.sides.append(side)
        self.results.append(result)

    def turn(self, number: int, seconds: float, together: bool) -> None:
        """One block of one side; nothing for a side that failed, or is sparing and had its share."""
        side, result = self.sides[number], self.results[number]
        times = result.turns if together else result.alone
        if side in self.out or (side.sparing and sum(times) >= SPARING_SECONDS):
            return
        try:
            times += side.measure(seconds)
        except SideError as e:
            self.fail(side, e)

    def fail(self, side: Side, error: SideError) -> None:
        """Without the first side there is nothing to compare with: raises its error."""
        if not self.sides or side is self.sides[0]:
            raise error
        self.failures.append(Failure(side.name, str(error)))
        self.out.add(side)
        side.kill()

    def measured(self) -> list[Measurement]:
        return [result for side, result in zip(self.sides, self.results, strict=True) if side not in self.out]


def take_turns(
    entrants: Sequence[Entrant],
    feed: Arrays,
    cores: Sequence[int],
    rounds: int,
    turn: float = TURN,
    alone: float = ALONE,
    patience: float = PATIENCE,
) -> tuple[list[Measurement], list[Failure], Interference]:
    """Measure all entrants on the same feed and cores; raises SideError when the first cannot run.

    Any other that cannot is among the failures, and the rest go on. `patience`: seconds that a side may take to open
    its model, and for each turn.
    """
    contest = Contest()
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder, contextlib.ExitStack() as stack:
        inputs = Path(folder) / "inputs.npz"
        with open(inputs, "wb") as stream:
            save_arrays(stream, feed)
        for number, entrant in enumerate(entrants):
            tell(f"opening {entrant.side}", number, len(entrants))
            outputs = Path(folder) / f"outputs_{number}.npz"
            contest.open(stack.enter_context(Side(entrant, inputs, outputs, cores, patience)), alone)
        processes = [side.process.pid for side in contest.sides]
        before = read_usage(cores, processes)
        count = len(contest.sides)
        for step, (number, together) in enumerate(schedule(count, rounds)):
            tell("taking turns", step, count * (rounds + min(rounds, PARTS)))
            contest.turn(number, turn if together else alone, together)
        others = interference(before, read_usage(cores, processes), cores)
        return contest.measured(), contest.failures, others


def schedule(sides: int, rounds: int) -> Iterator[tuple[int, bool]]:
    """(side, whether it is a turn): rounds of turns, every other one backwards so that no side always follows the same
    one, and after every third of the rounds a block alone, so that a machine that slows down slows both alike."""
    ends = {rounds * part // PARTS for part in range(1, PARTS + 1)}
    for index in range(rounds):
        order = range(sides) if index % 2 == 0 else reversed(range(sides))
        yield from ((number, True) for number in order)
        if index + 1 in ends:
            yield from ((number, False) for number in range(sides))
