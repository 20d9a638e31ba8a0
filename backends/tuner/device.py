"""The machine that kernels are tuned for: where the model's time goes there, and who measures single kernels."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graphopt.backends.tuner import local, machine
from graphopt.backends.tuner.measuring import Case, Measurer
from graphopt.backends.tuner.record import Hardware
from graphopt.errors import UsageError
from graphopt.runtime.features import missing

if TYPE_CHECKING:
    from graphopt.backends.target import Target

_ROUNDS = 10  # runs of the model that tell where its time goes

Feeds = Mapping[str, Mapping[str, "np.ndarray[Any, Any]"]]  # entry -> input -> array


class Device(Protocol):
    """What tuning asks of a machine, this one or another."""

    @property
    def hardware(self) -> Hardware:
        """What its measurements are valid for."""
        ...

    @property
    def measurer(self) -> Measurer:
        """Where single kernels run."""
        ...

    def provenance(self) -> Mapping[str, str]:
        """Where and when, for a record that is made now."""
        ...

    def kernels(self, function: str, cases: Sequence[Case]) -> Mapping[str, Any]:
        """Functions that its measurer needs in the library of a kernel called `function`, for these cases."""
        ...

    def kernel_seconds(self, artifact: Any, feeds: Feeds) -> Mapping[str, float]:
        """What each kernel takes of one run of every entry of a `graphopt.Artifact` that runs on this machine."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class ThisMachine:
    """Raises UsageError where it cannot run code for `target`, or with so many threads."""

    def __init__(self, target: Target) -> None:
        if lacking := missing(target.features):
            raise UsageError(f"nothing can be measured for {target.name} here: this machine lacks {', '.join(lacking)}")
        available = len(os.sched_getaffinity(0))
        if target.threads > available:
            raise UsageError(f"threads is {target.threads} and this process may use {available} CPUs; tune with fewer")
        self._threads = target.threads
        self.hardware = machine.this_hardware(target.name, target.threads)
        self.measurer: Measurer = local.LocalMeasurer()

    def provenance(self) -> Mapping[str, str]:
        return machine.provenance()

    def kernels(self, function: str, cases: Sequence[Case]) -> Mapping[str, Any]:
        return {}

    def kernel_seconds(self, artifact: Any, feeds: Feeds) -> Mapping[str, float]:
        return seconds_here(artifact, feeds, self._threads)

    def close(self) -> None:
        self.measurer.close()


def seconds_here(artifact: Any, feeds: Feeds, threads: int) -> Mapping[str, float]:
    """`Device.kernel_seconds` of this machine."""
    session = artifact.session(threads)
    taken: dict[str, float] = defaultdict(float)
    for entry, feed in feeds.items():
        rounds = session.profile_rounds(feed, entry, _ROUNDS)
        for kernel in {kernel for each in rounds for kernel in each}:
            taken[kernel] += statistics.median(sum(each.get(kernel, ())) for each in rounds)
    return taken
