"""One model beside its peers: compiled and exported into a folder, then measured in turns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import UsageError
from graphopt.tools.benchmarking.report import build_report
from graphopt.tools.benchmarking.turns import PATIENCE, Entrant, Failure, take_turns
from graphopt.tools.tuning.options import UNTUNED, Tuning

if TYPE_CHECKING:
    from graphopt.program import Program

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Settings:
    """`cores` are the CPUs of every side, one thread each; `patience`: seconds a side may take to open its model.

    `dtype` is what all sides multiply in, "f32" or "bf16"; `tuning` is what our own side is compiled with.
    """

    cores: Sequence[int]
    rounds: int
    patience: float = PATIENCE
    dtype: str = "f32"
    tuning: Tuning = UNTUNED

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds} measures nothing; give at least 1")
        if not self.patience > 0:
            raise UsageError(f"--peer-timeout {self.patience:g} lets nothing start; give seconds above 0")


def choose_cores(threads: int | None) -> list[int]:
    """The first `threads` CPUs this process may use; raises UsageError when there are fewer."""
    available = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(available):
        raise UsageError(f"--threads {threads} is not possible; this process may use 1 to {len(available)} CPUs")
    return available[:threads]


def compile_to(program: Program, folder: Path, settings: Settings) -> str:
    """The path of the artifact of `program` at O2 with its products in the dtype, for a thread for each core."""
    import graphopt

    passes = "O2" if settings.dtype == "f32" else f"O2,mixed-precision{{dtype={settings.dtype}}}"
    optimized = graphopt.optimize(program, passes, database=settings.tuning.options()["database"]).program
    return save_compiled(optimized, str(folder / "model.gopt"), settings)


def save_compiled(optimized: Program, path: str, settings: Settings) -> str:
    """`path`, with the artifact of a program as it is."""
    import graphopt

    graphopt.compile(optimized, threads=len(settings.cores), **settings.tuning.options()).save(path)
    return path


def compare(
    entrants: Sequence[Entrant],
    failures: Sequence[Failure],
    feed: Mapping[str, Array],
    expected: Sequence[Array] | None,
    settings: Settings,
) -> dict[str, Any]:
    """The report on the entrants; `failures` are sides that could not become one.

    Errors are against `expected`, else the first entrant. Raises SideError when the first cannot run.
    """
    measurements, failed, others = take_turns(
        entrants, feed, settings.cores, settings.rounds, patience=settings.patience
    )
    return build_report(
        measurements, [*failures, *failed], others, feed, expected, settings.cores, settings.rounds, settings.dtype
    )
