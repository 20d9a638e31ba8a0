"""Candidates of one workload, built and measured: from a configuration to times beside the default's."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.backends.choice import Site
from graphopt.backends.kernel import Code
from graphopt.backends.sizes import Shape, Size, symbols_in
from graphopt.backends.target import Target
from graphopt.backends.tuner.building import Builder, support_kernels
from graphopt.backends.tuner.measuring import Argument, Case, Entrant, MeasureError, Measurer, Race, Times
from graphopt.errors import CompileError

_FUNCTION = "kernel"
_MOST_BYTES = 1 << 30  # of weights in one race
_START_SECONDS = 6.0  # that a race may take besides its turns: a child that starts, on a machine that others use
_BYTES_A_SECOND = 50 << 20  # at which arguments are made, at the least
_WRITING = threading.Lock()  # kernels are written by one thread at a time
_PATIENCE = 20  # how much longer than the default a candidate may take before it counts as hung

Point = Mapping[str, int]  # a value for each symbol of a program


@dataclass(frozen=True, eq=False)
class Workpiece:
    """One kernel to measure: where it is written, and the sizes that count."""

    site: Site
    points: tuple[Point, ...]


@dataclass
class Bench:
    """Builds with `builder` and measures with `measurer`; `cold_bytes` as in `Race`, `beside` as `Device.kernels`."""

    target: Target
    builder: Builder
    measurer: Measurer
    cold_bytes: int
    seed: int = 0
    beside: Callable[[str, Sequence[Case]], Mapping[str, Any]] = lambda function, cases: {}
    _support: bytes = field(default=b"", init=False)

    def build(self, piece: Workpiece, configurations: Sequence[Any]) -> list[Entrant | str]:
        """An entrant of each configuration, or why there is none."""
        found: list[Entrant | str | None] = []
        written = []
        for configuration in configurations:
            try:
                with _WRITING:
                    code, values = piece.site.lowering.trial(piece.site.made.choice, configuration)
            except Exception as e:  # of whatever kind: it costs this candidate
                found.append(f"{type(e).__name__}: {e}".splitlines()[0])
                continue
            written.append((code, tuple(_arguments(code, values, point) for point in piece.points)))
            found.append(None)
        kernels = [{_FUNCTION: code.function, **self.beside(_FUNCTION, cases)} for code, cases in written]
        libraries = iter(self.builder.build(kernels))
        cases = iter(cases for _, cases in written)
        return [_entrant(next(libraries), next(cases)) if item is None else item for item in found]

    def race(self, entrants: Sequence[Entrant], turns: int, seconds: float, expected: float) -> list[Times | str]:
        """Times of each, the first being the default; or why there are none.

        `expected` seconds of one call tell a candidate that hangs. One that breaks a race is found by racing each with
        the default alone. Raises MeasureError where the default itself cannot be measured.
        """
        results: list[Times | str] = []
        for group in _groups(entrants[1:], max(1, _MOST_BYTES - _bytes(entrants[0]))):
            found = self._race_group([entrants[0], *group], turns, seconds, expected)
            results += found if not results else found[1:]
        return results

    def _race_group(self, group: Sequence[Entrant], turns: int, seconds: float, expected: float) -> list[Times | str]:
        try:
            return list(self._race(group, turns, seconds, expected))
        except MeasureError as e:
            if len(group) == 1:
                raise
            if len(group) == 2:
                return [*self._race(group[:1], turns, seconds, expected), str(e)]
        found: list[Times | str] = []
        for candidate in group[1:]:
            pair = self._race_group([group[0], candidate], turns, seconds, expected)
            found += pair if not found else pair[1:]
        return found

    def _race(self, group: Sequence[Entrant], turns: int, seconds: float, expected: float) -> list[Times]:
        cases = sum(len(entrant.cases) for entrant in group)
        turn = _PATIENCE * max(seconds, expected)
        race = Race(group, self._support_library(), self.target.threads, turns, seconds, self.cold_bytes, self.seed)
        start = _START_SECONDS + sum(map(_argument_bytes, group)) / _BYTES_A_SECOND
        return self.measurer.race(race, start + turns * cases * turn)

    def _support_library(self) -> bytes:
        if not self._support:
            (built,) = self.builder.build([support_kernels(self.target)])
            if isinstance(built, str):
                raise CompileError(f"nothing can be measured for {self.target.name}: {built}")
            self._support = built
        return self._support


def _entrant(library: bytes | str, cases: tuple[Case, ...]) -> Entrant | str:
    return library if isinstance(library, str) else Entrant(library, _FUNCTION, cases)


def _bytes(entrant: Entrant) -> int:
    """Of weights."""
    return sum(item.values.nbytes for case in entrant.cases[:1] for item in case if item.values is not None)


def _argument_bytes(entrant: Entrant) -> int:
    """About, of all arguments."""
    return sum(8 * math.prod(item.shape) for case in entrant.cases for item in case)


def _groups(entrants: Sequence[Entrant], most: int) -> list[list[Entrant]]:
    """In order, each with at most so many bytes of weights; at least one group, and in each at least one entrant."""
    groups: list[list[Entrant]] = [[]]
    size = 0
    for entrant in entrants:
        size += _bytes(entrant)
        if groups[-1] and size > most:
            groups.append([])
            size = _bytes(entrant)
        groups[-1].append(entrant)
    return groups


def _arguments(code: Code, values: Sequence[np.ndarray | None], point: Point) -> Case:
    """Inputs, sizes, then outputs, as kernels take them."""
    found = []
    for storage, array in zip(code.inputs, values, strict=True):
        role = "input" if array is None else "weight"
        found.append(Argument(role, storage.dtype, _shape(storage.shape, point), array))  # type: ignore[arg-type]
    found += [Argument("size", "int64", number=point[name]) for name in code.scalars]
    found += [Argument("output", dtype, _shape(shape, point)) for shape, dtype in code.outputs]
    return tuple(found)


def _shape(shape: Shape, point: Point) -> tuple[int, ...]:
    return tuple(value_of(size, point) for size in shape)


def value_of(size: Size, point: Point) -> int:
    """A size where every symbol has a value."""
    if isinstance(size, int):
        return size
    return int(size.subs({symbol: point[symbol.name] for symbol in size.free_symbols}))


def fitting(site: Site, points: Sequence[Point]) -> tuple[Point, ...]:
    """Of the points those at which the kernel's arrays have elements, each once; the first one always."""
    choice = site.made.choice
    code, _ = site.lowering.trial(choice, choice.default)
    shapes = [storage.shape for storage in code.inputs] + [shape for shape, _ in code.outputs]
    sizes = [size for shape in shapes for size in shape]
    names = symbols_in(shapes) | set(code.scalars)
    own = [{name: point[name] for name in sorted(names)} for point in points]
    found = [point for point in own if point == own[0] or all(value_of(size, point) > 0 for size in sizes)]
    return tuple(point for number, point in enumerate(found) if point not in found[:number])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
