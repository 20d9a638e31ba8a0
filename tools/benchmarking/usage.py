"""What a process used, and how much of the measured CPUs went to others: look there when a row is not valid."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")  # of the kernel's accounting, per second


@dataclass(frozen=True)
class Interference:
    """Shares of the CPUs' time: taken by other processes, and by other machines of the same host."""

    elsewhere: float
    stolen: float


@dataclass(frozen=True)
class Usage:
    """Seconds so far: wall clock, and CPU time of everybody, of the host's other machines, of our own processes."""

    wall: float
    busy: float
    stolen: float
    own: float


def read_usage(cores: Iterable[int], processes: Iterable[int]) -> Usage:
    wanted = {f"cpu{core}" for core in cores}
    busy = stolen = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _, _, interrupts, soft_interrupts, steal = map(int, fields[:8])
            busy += user + nice + system + interrupts + soft_interrupts
            stolen += steal
    own = sum(process_ticks(process) for process in (*processes, os.getpid()))
    return Usage(time.monotonic(), busy / TICK, stolen / TICK, own / TICK)


def process_ticks(process: int) -> int:
    """User and system time of all threads; 0 for a process that is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    user, system = text.rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def peak_memory() -> int:
    """Most bytes this process ever had in memory (getrusage would count its parent's, from before the exec)."""
    return _status("VmHWM")


def present_memory() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def interference(before: Usage, after: Usage, cores: Sequence[int]) -> Interference:
    available = max(after.wall - before.wall, 1 / TICK) * len(cores)
    foreign = after.busy - before.busy - (after.own - before.own)
    return Interference(max(0.0, foreign / available), (after.stolen - before.stolen) / available)
