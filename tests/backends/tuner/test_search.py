"""The search on made-up times: what it takes, what it leaves, and in which order it tries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphopt.backends.tuner.measuring import DeviceLostError, MeasureError
from graphopt.backends.tuner.search import BATCH, FIRST, LAST, Carried, Found, Search
from tests.backends.tuner.fake_bench import DEFAULT, FakeBench, Point, as_bench, piece, settings

MANY = [Point(x) for x in range(1, 40)]
TURNS = LAST.turns


def search(bench: FakeBench, candidates: list[Point] = MANY, seconds: float = 1000.0, **options: object) -> Found:
    told: list[float] = []
    tolerance = float(options.pop("tolerance", 0.0))  # type: ignore[arg-type]
    work = piece(candidates, tolerance=tolerance)
    found = Search(as_bench(bench), work, lambda: seconds - bench.now, told.append, **options).run()  # type: ignore[arg-type]
    assert told == sorted(told, reverse=True)
    return found


def fastest_at(x: int, gain: float = 0.5) -> Callable[[Point, int, int], float]:
    return lambda point, turn, case: 1e-3 * (gain if point.x == x else 1.2 if point.x else 1.0)


def test_the_fastest_is_found_wherever_it_is() -> None:
    for x in (1, 17, 39):
        found = search(FakeBench(fastest_at(x)))
        assert found.configuration == Point(x) and found.exhausted and not found.failures
        assert found.seconds == pytest.approx(0.5e-3) and found.default_seconds == pytest.approx(1e-3)


def test_the_default_stays_where_the_gain_is_small() -> None:
    found = search(FakeBench(fastest_at(3, gain=0.99)))
    assert found.configuration == DEFAULT and found.seconds == found.default_seconds == pytest.approx(1e-3)


def test_luck_does_not_last() -> None:
    """Fast whenever many are measured for a short time, and slow when it counts."""

    def lucky(point: Point, turn: int, case: int) -> float:
        return 0.5 if point.x == 7 and len(bench.raced[-1]) > 2 else 1.1 if point.x else 1.0

    bench = FakeBench(lucky)
    assert search(bench).configuration == DEFAULT
    assert bench.raced[-1] == [DEFAULT, Point(7)]


def test_faster_by_less_than_the_spread_is_not_faster() -> None:
    """Half as long in most turns, but longer in every third."""
    bench = FakeBench(lambda point, turn, case: 1.0 if not point.x else 1.5 if turn % 3 == 0 else 0.5)
    assert search(bench).configuration == DEFAULT


def test_slower_at_one_of_the_sizes_is_not_faster() -> None:
    bench = FakeBench(lambda point, turn, case: 1.0 if not point.x else (0.2, 1.05)[case], cases=2)
    assert search(bench).configuration == DEFAULT
    better = FakeBench(lambda point, turn, case: 1.0 if point.x != 5 else (0.2, 0.8)[case], cases=2)
    found = search(better)
    assert found.configuration == Point(5) and found.seconds == pytest.approx(0.4)


def test_the_fastest_is_not_taken_when_it_is_wrong() -> None:
    bench = FakeBench(fastest_at(3), wrong={Point(3): 1e-4, Point(4): 1e-6})
    found = search(bench, tolerance=1e-5)
    assert found.configuration == DEFAULT and found.exhausted
    assert found.failures == ("fake n=1: x=3 y=0: wrong: its results differ by 1.0e-04 of the largest",)


def test_what_fails_is_said() -> None:
    found = search(FakeBench(fastest_at(5), faults={Point(2): "it ended"}))
    assert found.configuration == Point(5)
    assert found.failures == ("fake n=1: x=2 y=0: not measured: it ended",)


def test_a_default_that_fails_is_an_error() -> None:
    with pytest.raises(MeasureError, match="no device"):
        search(FakeBench(fastest_at(1), faults={DEFAULT: "no device"}))


def test_it_ends_in_time_with_what_it_has() -> None:
    bench = FakeBench(fastest_at(1))
    found = search(bench, seconds=5.0)
    assert found.configuration == Point(1) and 0 < len(found.tried) < found.space
    assert bench.now <= 5.0
    nothing = search(FakeBench(fastest_at(1)), seconds=0.1)
    assert nothing.configuration == DEFAULT and not nothing.tried


def test_the_next_run_goes_on_where_this_one_ended() -> None:
    first = search(FakeBench(fastest_at(30)), seconds=4.0)
    bench = FakeBench(fastest_at(30))
    found = search(bench, before=first.tried, incumbent=settings(Point(2)))
    assert bench.built[1] == Point(2)  # what was best before takes part
    assert not set(map(Point, first.tried)) & set(bench.built) - {DEFAULT, Point(2)}
    assert found.configuration == Point(30) and found.exhausted


def test_the_seed_shuffles_the_far_end_of_the_order() -> None:
    def tried(seed: int) -> list[int]:
        bench = FakeBench(lambda point, turn, case: 1.0, seed=seed)
        search(bench)
        return [point.x for point in bench.built]

    one, same, other = tried(1), tried(1), tried(2)
    assert one == same != other and sorted(one) == sorted(other)
    assert one[: BATCH + 1] == other[: BATCH + 1] == list(range(BATCH + 1))


def test_settings_that_were_fast_are_tried_earlier() -> None:
    """With y = 5 everything is fast; the first batch holds one such candidate, and the others follow at once."""
    slow, fast = [Point(x) for x in range(1, 8)], [Point(1, 5), *(Point(x, 5) for x in range(20, 25))]
    others = [Point(x) for x in range(8, 20)]
    bench = FakeBench(lambda point, turn, case: 0.5 if point.y else 1.0)
    search(bench, [*slow, fast[0], *others, *fast[1:]])
    assert set(bench.built[BATCH + 1 :][:5]) == set(fast[1:])


def lost_in(race: int, carried: Carried) -> FakeBench:
    """A search on a device that is gone in its race of this number."""
    bench = FakeBench(fastest_at(3))
    bench.loses = lambda points: len(bench.raced) == race
    with pytest.raises(DeviceLostError):
        search(bench, carried=carried)
    return bench


@pytest.mark.parametrize("race", [1, 2, 3, 5, 6, 7, 8, 9])
def test_a_lost_device_costs_what_was_on_it(race: int) -> None:
    """In any race, from that of the default alone to the last one."""
    carried = Carried()
    lost, other = lost_in(race, carried), FakeBench(fastest_at(3))
    on_it = set(lost.raced[-1][1:])
    done = {point for points in lost.raced[:-1] for point in points[1:]}
    contenders = {point for point in MANY if MANY.index(point) + 1 in carried.contenders}
    found = search(other, carried=carried)
    assert found.configuration == Point(3) and found.exhausted and not found.failures
    assert len(contenders) <= FIRST.kept and on_it <= contenders | set(MANY) - done
    assert {point for points in other.raced for point in points[1:]} == set(MANY) - done | contenders


def test_what_took_two_devices_is_given_up() -> None:
    carried, benches = Carried(), [FakeBench(fastest_at(3)) for _ in range(3)]
    for bench in benches:
        bench.loses = lambda points: Point(5) in points
    for bench in benches[:2]:
        with pytest.raises(DeviceLostError):
            search(bench, carried=carried)
    assert benches[1].raced[-1] == [DEFAULT, Point(5)]
    found = search(benches[2], carried=carried)
    assert found.configuration == Point(3) and found.exhausted
    assert found.failures and all("2 devices were lost with it on them" in failure for failure in found.failures)


def test_a_default_that_took_two_devices() -> None:
    carried = Carried()
    for _ in range(2):
        lost_in(1, carried)
    with pytest.raises(MeasureError, match="2 devices were lost with the default on them"):
        search(FakeBench(fastest_at(3)), carried=carried)
