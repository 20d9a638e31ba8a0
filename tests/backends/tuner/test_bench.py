"""Real kernels built and raced in real children: each broken candidate costs itself and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graphopt.backends.target import Target, resolve_target
from graphopt.backends.tuner import bench as benches
from graphopt.backends.tuner.bench import Bench
from graphopt.backends.tuner.building import Builder
from graphopt.backends.tuner.local import LocalMeasurer
from graphopt.backends.tuner.measuring import Entrant, MeasureError, Times
from graphopt.backends.tuner.search import Search
from tests.backends.tuner.faults import Kind, workpiece

TARGET: Target = resolve_target("cpu", 1)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    builder, measurer = Builder(TARGET), LocalMeasurer(1 << 30)
    yield Bench(TARGET, builder, measurer, cold_bytes=0)
    builder.close()
    measurer.close()


def entrants(bench: Bench, *names: str) -> list[Entrant]:
    found = bench.build(workpiece(TARGET, *names), [Kind(name) for name in ("default", *names)])
    assert not [each for each in found if isinstance(each, str)]
    return [each for each in found if isinstance(each, Entrant)]


def test_what_cannot_be_built_is_said(bench: Bench) -> None:
    piece = workpiece(TARGET, "not_written", "not_compiled", "same")
    written, compiled, same = bench.build(piece, [Kind(name) for name in ("not_written", "not_compiled", "same")])
    assert written == "ValueError: no kernel for this one"
    assert isinstance(compiled, str) and isinstance(same, Entrant)


def test_right_and_wrong(bench: Bench) -> None:
    default, same, wrong = bench.race(entrants(bench, "same", "plus_two"), 2, 0.001, 0.001)
    assert isinstance(default, Times) and isinstance(same, Times) and isinstance(wrong, Times)
    assert same.difference == 0 and wrong.difference > 0.1 and len(same.seconds[0]) == 2


@pytest.mark.parametrize("fault", ["crash", "eat"])
def test_a_fault_costs_one_candidate(bench: Bench, fault: str) -> None:
    default, first, broken, last = bench.race(entrants(bench, "same", fault, "same"), 1, 0.001, 0.001)
    assert isinstance(broken, str), broken
    assert all(isinstance(times, Times) and times.difference == 0 for times in (default, first, last))


def test_a_hang_costs_one_candidate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "_START_SECONDS", 1.0)
    _, broken, same = bench.race(entrants(bench, "hang", "same"), 1, 0.001, 0.001)
    assert broken == "it took over 1 s" and isinstance(same, Times)


def test_a_default_that_cannot_be_measured_is_an_error(bench: Bench) -> None:
    default, crash = entrants(bench, "crash")
    with pytest.raises(MeasureError, match="SIG"):
        bench.race([crash, default], 1, 0.001, 0.001)


def test_a_search_drops_them_all_and_keeps_the_default(bench: Bench) -> None:
    names = ("crash", "plus_two", "not_written")
    found = Search(bench, workpiece(TARGET, *names), lambda: 1000.0, lambda ratio: None).run()
    assert found.configuration == Kind("default") and found.seconds == found.default_seconds > 0
    assert found.exhausted and found.tried == frozenset(range(4))
    reasons = {failure.split(": ")[1].removeprefix("name="): failure for failure in found.failures}
    assert set(reasons) == set(names)
    assert "not measured: its process ended with signal SIG" in reasons["crash"]
    assert "wrong: its results differ" in reasons["plus_two"]
    assert "not built: ValueError: no kernel" in reasons["not_written"]
