"""What measuring kernels means, wherever the device is: entrants of one workload that run in turns.

The first entrant is the default. Results are compared first, with the model's weights. Before each timed call the
activations are written again by all threads in shares of rows, as the kernel before would have left them in the
caches, and weights lie elsewhere each time, so that they come from memory as in a model larger than the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from graphopt.errors import GraphoptError

Role = Literal["input", "weight", "output", "size"]

REFRESH = "graphopt_refresh"  # (data int32 [n], int32 0): every share writes its part of the data as it is


@dataclass(frozen=True, eq=False)
class Argument:
    """One argument of a kernel: an array of this shape, or a number where its role is "size".

    `values` are those of a weight; an input's are drawn by the measurer, the same for all entrants.
    """

    role: Role
    dtype: str
    shape: tuple[int, ...] = ()
    values: np.ndarray | None = None
    number: int = 0


Case = tuple[Argument, ...]


@dataclass(frozen=True, eq=False)
class Entrant:
    """A kernel in a library, and its arguments at each of the sizes that count."""

    library: bytes
    function: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, eq=False)
class Race:
    """Entrants that take `turns` turns of at least `seconds` each.

    Weights of floats are read from all over `cold_bytes` of memory, those of the whole model, or twice the device's
    largest cache.

    `support` is a library with `REFRESH` and the runtime's function that sets how denormals are treated.
    """

    entrants: Sequence[Entrant]
    support: bytes
    threads: int
    turns: int
    seconds: float
    cold_bytes: int
    seed: int = 0


@dataclass(frozen=True)
class Times:
    """Of one entrant: `seconds` [case][turn] are those of one call, the lower quartile of the turn's.

    `difference` is how far its results are from those of the first entrant, relative to the largest of them: 0 where
    they are equal, infinite where one is NaN and the other not.
    """

    seconds: tuple[tuple[float, ...], ...]
    difference: float


class MeasureError(GraphoptError):
    """A race has no result: an entrant crashed, hung or ran out of memory."""


class DeviceLostError(GraphoptError):
    """A device is gone: switched off, out of reach, or its server has ended."""


class Measurer(Protocol):
    """Runs races on a device."""

    def race(self, race: Race, limit: float) -> list[Times]:
        """The times of each entrant. Raises MeasureError where that takes over `limit` seconds or fails.

        Raises DeviceLostError where no other race can be run there, whether or not one of the entrants is to blame.
        """
        ...

    def close(self) -> None:
        """Let go of the device, also while another thread waits for a race on it."""
        ...
