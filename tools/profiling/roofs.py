"""The most this CPU does with a number of threads: multiply-adds, and bytes read from each of its memories."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.runtime.caches import cache_sizes
from graphopt.runtime.library import ffi, open_library
from graphopt.runtime.tensors import aligned_copy
from graphopt.runtime.threads import Runner

MOST_MEMORY = 512 << 20  # bytes of the longest array
_TRIES = 8
_MEASUREMENTS = 6
_PAUSE = 0.4  # seconds between them: a core that others had for many time slices is back
_ROUNDS = 50_000
_LEAST_READ = 64 << 20  # bytes one call reads at least, about a millisecond


@dataclass(frozen=True)
class Level:
    """A cache, or memory: working sets up to `capacity` bytes (None: any) are read at `bytes_per_second`."""

    name: str
    capacity: int | None
    bytes_per_second: float


@dataclass(frozen=True)
class Roofs:
    """Measured with `threads` threads; `levels` from the nearest to memory; a launch is a kernel that does nothing.

    `pairs_per_second`: operations on bfloat16 in vectors, `tiles_per_second` in tiles, each None where there is no
    instruction for it.
    """

    threads: int
    flops_per_second: float
    levels: tuple[Level, ...]
    launch_seconds: float
    pairs_per_second: float | None = None
    tiles_per_second: float | None = None


class RoofMeter:
    """Measures the roofs with `threads` threads as often as it is asked to; building takes a few seconds.

    Raises MissingExtraError or CompileError where it cannot.
    """

    def __init__(self, threads: int) -> None:
        from graphopt.optional import missing_extra

        try:
            from graphopt.backends import roofs
        except ImportError as e:
            raise missing_extra("the share of the machine's roofs", e) or e from e
        target = roofs.target_here(threads)
        code = roofs.build_roofs(threads)
        library = open_library("roofs", code, hashlib.sha256(code).hexdigest())
        self._multiply_add, self._read = (
            library.get_function(name, query_imports=True) for name in (roofs.MULTIPLY_ADD, roofs.READ)
        )
        pairs = roofs.MULTIPLY_PAIRS if target.pairs else None
        self._multiply_pairs = pairs and library.get_function(pairs, query_imports=True)
        tiles = roofs.MULTIPLY_TILES if target.amx else None
        self._multiply_tiles = tiles and library.get_function(tiles, query_imports=True)
        self._tile_operations = threads * roofs.TILE_OPERATIONS
        self._result = ffi().from_dlpack(_zeros(threads * target.lanes).reshape(threads, target.lanes))
        self._operations = threads * roofs.operations(target)
        self._runner = Runner(threads)
        self._sets = working_sets(cache_sizes(), threads)
        self._best: Roofs | None = None

    def measure(self) -> Roofs:
        """The best of several measurements, with pauses between them, and of all before.

        Others can only make a machine look slower than it is.
        """
        for number in range(_MEASUREMENTS):
            if number:
                time.sleep(_PAUSE)
            found = self._once()
            self._best = best_of(self._best, found) if self._best else found
        assert self._best is not None
        return self._best

    def _once(self) -> Roofs:
        peak = _ROUNDS * self._operations / self._seconds(lambda: self._multiply_add(_ROUNDS, self._result))
        pairs = self._multiply_pairs
        doubled = 2 * _ROUNDS * self._operations
        wide = doubled / self._seconds(lambda: pairs(_ROUNDS, self._result)) if pairs else None
        tiles = self._multiply_tiles
        tiled = _ROUNDS * self._tile_operations
        tile_rate = tiled / self._seconds(lambda: tiles(_ROUNDS, self._result)) if tiles else None
        launch = self._seconds(lambda: self._multiply_add(0, self._result))
        threads = self._runner.threads
        levels = []
        for name, capacity, size in self._sets:
            floats = size // 4 // (64 * 16 * threads) * (64 * 16 * threads)
            data = ffi().from_dlpack(_zeros(floats))
            rounds = max(1, _LEAST_READ // (4 * floats))
            seconds = self._seconds(lambda data=data, rounds=rounds: self._read(rounds, data, self._result))  # type: ignore[misc]
            levels.append(Level(name, capacity, rounds * 4 * floats / seconds))
        return Roofs(threads, peak, tuple(levels), launch, wide, tile_rate)

    def _seconds(self, call: Callable[[], object]) -> float:
        return self._runner.run(lambda: _fastest(call))


def measure_roofs(threads: int) -> Roofs:
    """Takes a few seconds, most of them for building. Raises MissingExtraError or CompileError where it cannot."""
    return RoofMeter(threads).measure()


def best_of(one: Roofs, other: Roofs) -> Roofs:
    """The higher of each roof; both of the same machine and threads."""
    levels = tuple(
        max(pair, key=lambda level: level.bytes_per_second) for pair in zip(one.levels, other.levels, strict=True)
    )
    peak = max(one.flops_per_second, other.flops_per_second)
    pairs = max(one.pairs_per_second or 0, other.pairs_per_second or 0) or None
    tiles = max(one.tiles_per_second or 0, other.tiles_per_second or 0) or None
    return Roofs(one.threads, peak, levels, min(one.launch_seconds, other.launch_seconds), pairs, tiles)


def working_sets(caches: dict[int, int], threads: int) -> list[tuple[str, int | None, int]]:
    """(name, capacity, bytes to read) of each level: half of a cache, so that it stays there, or four times the last.

    Each thread has its own L1 and L2 and all share the L3, which is how most x86-64 CPUs are made.
    """
    sizes = {level: caches[level] * (threads if level < 3 else 1) for level in sorted(caches)}
    found: list[tuple[str, int | None, int]] = [(f"L{level}", size, size // 2) for level, size in sizes.items()]
    return [*found, ("memory", None, min(4 * max(sizes.values()), MOST_MEMORY))]


def _zeros(count: int) -> Any:
    return aligned_copy(np.zeros(count, np.float32), np.dtype(np.float32))


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls after one that warms up."""
    call()
    times = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
