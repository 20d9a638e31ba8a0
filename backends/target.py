"""Targets: the machine an artifact is compiled for, as `family` or `family:level`."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from graphopt.errors import UnknownNameError, UsageError
from graphopt.runtime.features import host_features

# x86-64 psABI micro-architecture levels (System V ABI, section 3.1.1) as the runtime spells the flags, oldest first.
_V3 = ("x86_64", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
LEVELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu:x86-64-v3": ("x86-64-v3", _V3),
    "cpu:x86-64-v4": ("x86-64-v4", _V4),
}
MOST_THREADS = 1024  # more CPUs than one machine has; shares of kernels beyond that are only overhead


@dataclass(frozen=True)
class Target:
    """`features` are the CPU flags the code needs; `threads` is how many equal shares a kernel's work is cut into."""

    name: str
    architecture: str
    features: tuple[str, ...]
    threads: int

    @property
    def lanes(self) -> int:
        """float32 lanes of one vector register."""
        return 16 if "avx512f" in self.features else 8


def resolve_target(name: str, threads: int | None = None) -> Target:
    """The target of this name; "cpu" is the best level this machine has. Raises UnknownNameError or UsageError."""
    available = len(os.sched_getaffinity(0))
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; give a number of at least 1")
    if threads is not None and threads > MOST_THREADS:
        raise UsageError(f"threads is {threads}; give a number of at most {MOST_THREADS}")
    if name == "cpu":
        name = _host_level()
    if name not in LEVELS:
        raise UnknownNameError("target", name, target_names())
    architecture, features = LEVELS[name]
    return Target(name, architecture, features, min(threads or available, MOST_THREADS))


def target_names() -> tuple[str, ...]:
    """Every name `resolve_target` takes."""
    return ("cpu", *LEVELS)


def _host_level() -> str:
    if platform.machine() != "x86_64":
        raise UsageError(
            f"this machine is {platform.machine()}; targets for it come later, x86-64 machines only for now"
        )
    features = host_features()
    for name in reversed(LEVELS):
        if set(LEVELS[name][1]) <= features:
            return name
    missing = sorted(set(_V3) - features)
    raise UsageError(f"this CPU lacks {', '.join(missing)}; the oldest supported level is cpu:x86-64-v3")
