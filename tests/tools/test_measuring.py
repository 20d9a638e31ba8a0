"""Which figures are taken for a kernel's time and for the roofs, from measurements that are made up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from graphopt.runtime.manifest import KernelInfo
from graphopt.runtime.profiling import Round, medians
from graphopt.tools.profiling.measuring import MOST, lower_quartile, lower_quartiles, measure
from graphopt.tools.profiling.roofs import Level, RoofMeter, Roofs, best_of

ROOFS = Roofs(2, 100.0, (Level("L1", 64, 1e3), Level("L2", 1024, 1e3), Level("memory", None, 1e3)), 1e-6)
NORM = KernelInfo("norm", flops=50, bytes=1)


@dataclass
class FakeSession:
    """Each measurement's rounds are the next of `found`, the last for ever; a run takes `whole` seconds."""

    found: list[list[Round]]
    kernels: Mapping[str, KernelInfo]
    whole: float = 1.0
    measured: int = 0

    @property
    def variant(self) -> Any:
        return SimpleNamespace(kernels=self.kernels)

    @property
    def last_run(self) -> Any:
        return SimpleNamespace(seconds=self.whole, sizes={"rows": 3})

    def run(self, *arguments: Any) -> None: ...

    def reset(self) -> None: ...

    def profile_rounds(self, feed: Any, entry: str, rounds: int) -> list[Round]:
        self.measured += 1
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]


@dataclass
class FakeMeter:
    found: list[Roofs]

    def measure(self) -> Roofs:
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]


def profile_of(session: FakeSession, *found: Roofs, rounds: int = 4) -> Any:
    profile, sizes = measure(session, {}, "main", rounds, FakeMeter(list(found)) if found else None)  # type: ignore[arg-type]
    assert sizes == {"rows": 3}
    return profile


def rounds_of(*seconds: float) -> list[Round]:
    return [{"norm": [each]} for each in seconds]


def test_the_lower_quartile_is_one_of_the_values() -> None:
    assert [lower_quartile(list(range(count))) for count in (1, 2, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert lower_quartile([9.0, 1.0, 9.0, 9.0]) == 1.0


def test_a_kernels_time_is_the_lower_quartile_of_its_rounds() -> None:
    """Within a round the median counts, so that calls that cost more than others are not left out."""
    rounds: list[Round] = [{"a": [1.0, 2.0, 3.0], "b": [5.0]}, {"a": [8.0, 9.0, 9.0]}, {"a": [7.0, 4.0, 1.0]}]
    assert lower_quartiles(rounds) == {"a": (3.0, 2.0), "b": (1 / 3, 5.0)}
    assert medians(rounds) == {"a": (3.0, 4.0), "b": (1 / 3, 5.0)}


def test_three_disturbed_rounds_in_four_change_nothing() -> None:
    session = FakeSession([rounds_of(40.0, 0.6, 40.0, 40.0)], {"norm": NORM}, whole=0.6)
    (row,) = profile_of(session, ROOFS).rows
    assert row.seconds_per_call == 0.6 and row.slow is None and session.measured == 1


def test_what_looks_slow_is_measured_again() -> None:
    session = FakeSession([rounds_of(40.0, 40.0, 40.0, 40.0), rounds_of(0.6, 0.6, 0.6, 0.6)], {"norm": NORM})
    (row,) = profile_of(session, ROOFS).rows
    assert row.seconds_per_call == 0.6 and row.slow is None and session.measured == 2


def test_what_stays_slow_is_slow() -> None:
    """One fast round of many is luck, and does not acquit."""
    session = FakeSession([rounds_of(50.0, 0.6, 50.0, 50.0, 50.0, 50.0, 50.0, 50.0)], {"norm": NORM})
    (row,) = profile_of(session, ROOFS).rows
    assert row.seconds_per_call == 50.0 and session.measured == MOST
    assert row.slow == "1.0% of its own roof (FMA), under 20%"


def test_all_kernels_have_the_same_rounds() -> None:
    """The one that did not look slow is judged by the further rounds too, also where they are slower."""
    first: list[Round] = [{"norm": [40.0], "other": [0.6]}] * 4
    later: list[Round] = [{"norm": [0.6], "other": [0.9]}] * 16
    session = FakeSession([first, later], {"norm": NORM, "other": NORM})
    rows = {row.kernel: row for row in profile_of(session, ROOFS).rows}
    assert rows["other"].seconds_per_call == 0.9 and rows["norm"].seconds_per_call == 0.6


def test_a_generic_kernel_is_not_measured_again() -> None:
    session = FakeSession([rounds_of(40.0)], {"norm": replace(NORM, rule="generic")})
    (row,) = profile_of(session, ROOFS).rows
    assert str(row.slow).startswith("generic") and session.measured == 1
    without = FakeSession([rounds_of(40.0)], {"norm": NORM})
    assert not profile_of(without).slow and without.measured == 1


def test_a_roof_that_a_kernel_beats_is_measured_again() -> None:
    low = replace(ROOFS, flops_per_second=60.0)
    session = FakeSession([rounds_of(0.6)], {"norm": NORM})
    profile = profile_of(session, low, ROOFS)
    assert profile.roofs == ROOFS and session.measured == 2
    assert profile.rows[0].share_of_roof == pytest.approx(50 / 0.6 / 100)
    faster = FakeSession([rounds_of(0.6)], {"norm": NORM})
    assert profile_of(faster, low).rows[0].share_of_roof > 1 and faster.measured == MOST  # said in a note


def test_the_best_of_two_measurements_is_taken_roof_by_roof() -> None:
    one = replace(ROOFS, flops_per_second=50.0, launch_seconds=5e-6)
    levels = (replace(ROOFS.levels[0], bytes_per_second=1.0), replace(ROOFS.levels[1], bytes_per_second=9e9))
    other = replace(ROOFS, levels=(*levels, ROOFS.levels[2]))
    best = best_of(one, other)
    assert best == best_of(other, one)
    assert (best.flops_per_second, best.launch_seconds) == (100.0, 1e-6)
    assert [level.bytes_per_second for level in best.levels] == [1e3, 9e9, 1e3]


def test_roofs_are_measured_several_times_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    found = [
        replace(ROOFS, flops_per_second=speed) for speed in (116.0, 116.0, 233.0, 116.0, 116.0, 116.0, *[200.0] * 6)
    ]
    meter = object.__new__(RoofMeter)
    meter._best = None
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(RoofMeter, "_once", lambda self: found.pop(0))
    assert meter.measure().flops_per_second == 233.0 and len(pauses) == 5 and min(pauses) > 0
    assert meter.measure().flops_per_second == 233.0 and not found
