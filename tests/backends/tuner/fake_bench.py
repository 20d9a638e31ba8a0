"""A bench on which times are made up, and a clock that only building and racing move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from graphopt.backends.choice import Choice, Made, Site, settings_of
from graphopt.backends.tuner.bench import Bench, Workpiece
from graphopt.backends.tuner.measuring import DeviceLostError, Entrant, MeasureError, Times
from graphopt.backends.tuner.record import Workload

BUILD, RACE = 0.1, 0.05  # seconds a candidate takes on the clock


@dataclass(frozen=True)
class Point:
    """A configuration with two settings."""

    x: int
    y: int = 0


DEFAULT = Point(0)


@dataclass
class FakeBench:
    """`seconds(configuration, turn, case)` is what a call takes, `faults` say why something has no times."""

    seconds: Callable[[Point, int, int], float]
    cases: int = 1
    faults: Mapping[Point, str] = field(default_factory=dict)
    wrong: Mapping[Point, float] = field(default_factory=dict)
    seed: int = 0
    now: float = 0.0
    built: list[Point] = field(default_factory=list)
    raced: list[list[Point]] = field(default_factory=list)
    before_build: Callable[[], None] = lambda: None
    loses: Callable[[list[Point]], bool] = lambda points: False  # whether the device is gone in such a race

    closed: bool = False

    @property
    def measurer(self) -> FakeBench:
        return self

    @property
    def builder(self) -> FakeBench:
        return self

    def close(self) -> None:
        self.closed = True

    def clock(self) -> float:
        return self.now

    def build(self, piece: Workpiece, configurations: Sequence[Point]) -> list[Entrant | str]:
        self.before_build()
        self.built += configurations
        self.now += BUILD * len(configurations)
        return [Entrant(b"", (each.x, each.y), ()) for each in configurations]  # type: ignore[arg-type]

    def race(self, entrants: Sequence[Entrant], turns: int, seconds: float, expected: float) -> list[Times | str]:
        points = [Point(*cast(Any, entrant.function)) for entrant in entrants]
        self.raced.append(points)
        self.now += RACE * len(points)
        if self.loses(points):
            raise DeviceLostError("the device is gone")
        if points[0] in self.faults:
            raise MeasureError(self.faults[points[0]])
        return [self.faults.get(point) or self.times(point, turns) for point in points]

    def times(self, point: Point, turns: int) -> Times:
        each = range(self.cases)
        found = tuple(tuple(self.seconds(point, turn, case) for turn in range(turns)) for case in each)
        return Times(found, self.wrong.get(point, 0.0))


def as_bench(fake: FakeBench) -> Bench:
    return cast(Bench, fake)


def piece(candidates: Sequence[Point], name: str = "fake", tolerance: float = 0.0) -> Workpiece:
    """A kernel of which nothing but the choice is real."""

    def never(_: Any) -> Any:
        raise AssertionError("nothing is written here")

    choice = Choice(Workload.of(name, {"n": 1}), DEFAULT, lambda: candidates, never, tolerance)
    return Workpiece(Site(Made(choice, DEFAULT), cast(Any, None), name), ({},))


def settings(point: Point) -> dict[str, Any]:
    return settings_of(point)
