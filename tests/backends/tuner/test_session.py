"""A model's workloads on made-up times: shares of the seconds, what is kept, resuming, and Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import pytest

from graphopt.backends.tuner.measuring import DeviceLostError
from graphopt.backends.tuner.record import Hardware, Record
from graphopt.backends.tuner.session import LEAST, Outcome, Session, Station
from graphopt.backends.tuner.store import Store
from graphopt.backends.tuner.task_queue import Task
from graphopt.errors import WriteError
from graphopt.progress import told_to
from tests.backends.tuner.fake_bench import DEFAULT, FakeBench, Point, as_bench, piece, settings

HARDWARE = Hardware("cpu:x86-64-v4", ("avx2",), 2, "0.27")
SPACE = [Point(x) for x in range(1, 60)]
ABOUT = {"device": "a CPU", "date": "2026-01-01T00:00:00+00:00"}


def tasks(*shares: float, space: Sequence[Point] = SPACE) -> list[Task]:
    return [Task(piece(space, f"rule{number}"), (f"kernel{number}",), share) for number, share in enumerate(shares)]


def run(bench: FakeBench, found: list[Task], store: Store, seconds: float) -> Outcome:
    return Session(found, [Station(as_bench(bench), lambda: ABOUT)], store, HARDWARE, seconds, bench.clock).run()


def faster_at(x: int) -> FakeBench:
    return FakeBench(lambda point, turn, case: 1e-3 * (0.5 if point.x == x else 1.0))


def test_what_is_found_is_in_the_store() -> None:
    store, found = Store.empty(), tasks(0.7, 0.3)
    outcome = run(faster_at(3), found, store, 200.0)
    assert [row.kernels for row in outcome.rows] == [("kernel0",), ("kernel1",)] and not outcome.failures
    for row, task in zip(outcome.rows, found, strict=True):
        record = store.lookup(task.workload, HARDWARE)
        assert record and record.configuration == settings(Point(3)) == row.configuration
        assert (record.seconds, record.default_seconds) == (row.seconds, row.default_seconds)
        assert row.seconds == pytest.approx(5e-4) and row.default_seconds == pytest.approx(1e-3)
        assert record.provenance["seed"] == "0" and row.new and (row.tried, row.space) == (60, 60)


def test_a_default_that_stays_is_a_record_too() -> None:
    store, found = Store.empty(), tasks(1.0)
    run(faster_at(-1), found, store, 100.0)
    record = store.lookup(found[0].workload, HARDWARE)
    assert record and record.configuration == settings(DEFAULT) and record.ratio == 1


def test_seconds_go_by_shares_of_the_time() -> None:
    bench = faster_at(3)
    outcome = run(bench, tasks(0.1, 0.6, 0.3), Store.empty(), 20.0)
    assert [row.kernels[0] for row in outcome.rows] == ["kernel1", "kernel2", "kernel0"]
    tried = [row.tried for row in outcome.rows]
    assert tried[0] > tried[1] >= tried[2] > 0
    assert bench.now <= 20.0


def test_a_workload_without_much_to_try_leaves_its_seconds_to_others() -> None:
    small, large = tasks(0.9, space=SPACE[:4])[0], tasks(0.0, 0.1)[1]
    outcome = run(faster_at(50), [small, large], Store.empty(), 60.0)
    assert [(row.tried, row.space) for row in outcome.rows] == [(5, 5), (60, 60)]


def test_one_with_nothing_to_choose_is_left_alone() -> None:
    bench, store = faster_at(1), Store.empty()
    (row,) = run(bench, tasks(1.0, space=[]), store, 60.0).rows
    assert not bench.built and not store.records() and (row.tried, row.space, row.seconds) == (0, 1, None)


def test_too_little_time_begins_nothing() -> None:
    bench, store = faster_at(1), Store.empty()
    outcome = run(bench, tasks(1.0), store, LEAST / 2)
    assert not bench.built and not store.records() and outcome.rows[0].configuration == settings(DEFAULT)


def test_resuming_goes_on_and_ends() -> None:
    store, found = Store.empty(), tasks(1.0)
    bench = faster_at(-1)
    (first,) = run(bench, found, store, 8.0).rows
    assert 0 < first.tried < 60 and first.seconds == first.default_seconds
    later = next(point for point in SPACE if point not in bench.built)
    (second,) = run(faster_at(later.x), found, store, 100.0).rows
    assert second.tried == 60 and second.configuration == settings(later)
    bench, before = faster_at(later.x), store.records()
    (third,) = run(bench, found, store, 100.0).rows
    assert not bench.built and store.records() == before and not third.new
    assert (third.tried, third.configuration) == (60, settings(later))


def test_records_of_another_space_or_machine_do_not_count_as_tried() -> None:
    store = Store.empty()
    run(faster_at(3), tasks(1.0, space=SPACE[:9]), store, 100.0)
    (row,) = run(faster_at(3), tasks(1.0), store, 5.0).rows
    assert 0 < row.tried < 60
    other = Hardware("cpu:x86-64-v3", ("avx2",), 2, "0.27")
    bench = faster_at(3)
    Session(tasks(1.0), [Station(as_bench(bench), lambda: ABOUT)], store, other, 100.0, bench.clock).run()
    assert len(bench.built) >= 60


def test_ctrl_c_keeps_what_was_found() -> None:
    store, bench = Store.empty(), faster_at(3)

    def interrupt() -> None:
        if store.records():
            raise KeyboardInterrupt

    bench.before_build = interrupt
    found = tasks(0.6, 0.4)
    with pytest.raises(KeyboardInterrupt):
        run(bench, found, store, 200.0)
    assert [record.workload for record in store.records()] == [found[0].workload]
    outcome = run(faster_at(3), found, store, 200.0)
    assert [row.new for row in outcome.rows] == [False, True]


def test_a_kernel_that_cannot_be_measured_does_not_stop_the_others() -> None:
    bench = faster_at(3)
    bench.faults = {DEFAULT: "no device"}
    outcome = run(bench, tasks(0.6, 0.4), Store.empty(), 100.0)
    assert [failure.split(": ")[1] for failure in outcome.failures] == ["no device"] * 2
    assert [row.seconds for row in outcome.rows] == [None, None]


def test_a_kernel_too_slow_for_its_seconds_is_not_tried_again_and_again() -> None:
    """A run of it takes seconds, so that even the last measurements would."""
    bench, store = FakeBench(lambda point, turn, case: 3.0), Store.empty()
    run(bench, tasks(1.0), store, 30.0)
    assert bench.built == [DEFAULT] and not store.records()


def test_progress_tells_the_best_so_far_and_the_time_left() -> None:
    said: list[tuple[str, int, int]] = []
    with told_to(lambda stage, done, total: said.append((stage, done, total))):
        run(faster_at(3), tasks(0.6, 0.4), Store.empty(), 100.0)
    assert said[0] == ("rule0 n=1: best 1.000 of the default's time, 100 s left", 0, 2)
    assert "rule0 n=1: best 0.500 of the default's time" in said[1][0] and said[-1][1:] == (1, 2)


# Several devices ------------------------------------------------------------------------------------------------------
def together(benches: Sequence[FakeBench], found: list[Task], store: Store, seconds: float = 1000.0) -> Outcome:
    stations = [
        Station(as_bench(bench), lambda name=f"device {number}": ABOUT | {"server": name})  # type: ignore[misc]
        for number, bench in enumerate(benches)
    ]
    return Session(found, stations, store, HARDWARE, seconds, lambda: max(bench.now for bench in benches)).run()


def gone_after(races: int) -> FakeBench:
    """A device that is lost in the race after so many."""
    bench = faster_at(3)
    bench.loses = lambda points: len(bench.raced) > races
    return bench


def test_each_device_takes_what_is_next() -> None:
    """Neither goes on before the other one has a workload too."""
    benches, meeting = (faster_at(3), faster_at(3)), threading.Barrier(2)

    def meet(bench: FakeBench) -> None:
        if not bench.built:
            meeting.wait()

    for bench in benches:
        bench.before_build = partial(meet, bench)
    store, found = Store.empty(), tasks(0.5, 0.3, 0.2)
    outcome = together(benches, found, store)
    assert all(row.tried == row.space and row.configuration == settings(Point(3)) for row in outcome.rows)
    assert {record.provenance["server"] for record in store.records()} == {"device 0", "device 1"}
    assert len(store.records()) == 3 and not outcome.failures


@pytest.mark.parametrize("races", [0, 1, 4, 8, 10])
def test_another_device_goes_on_where_one_is_lost(races: int) -> None:
    """From the first race of a search to its last rungs, with what was best there."""
    lost, well, gone = faster_at(3), faster_at(3), threading.Event()

    def loses(points: Sequence[Point]) -> bool:
        if len(lost.raced) > races:
            gone.set()
        return gone.is_set()

    lost.loses = loses
    well.loses = lambda points: not gone.wait()
    store, found = Store.empty(), tasks(0.6, 0.4)  # one for each to begin with
    outcome = together((lost, well), found, store)
    assert all(row.configuration == settings(Point(3)) and row.tried == row.space == 60 for row in outcome.rows)
    assert [record.provenance["server"] for record in store.records()] == ["device 1"] * 2
    assert outcome.failures == ("the device is gone",)


def test_all_devices_lost() -> None:
    """Both after a workload each, which takes 12 races, and a part of the next one."""
    store, found = Store.empty(), tasks(0.5, 0.3, 0.2)
    devices = [gone_after(14), gone_after(14)]
    with pytest.raises(DeviceLostError, match=r"no device is left, the device is gone; start its server"):
        together(devices, found, store)
    kept = store.records()
    assert kept
    outcome = together([faster_at(3)], found, store)
    assert store.records()[: len(kept)] == kept and all(row.tried == 60 for row in outcome.rows)


def test_what_was_found_before_the_only_device_was_lost_is_kept() -> None:
    store, found = Store.empty(), tasks(0.6, 0.4)
    bench = faster_at(3)
    bench.loses = lambda points: bool(store.records())
    with pytest.raises(DeviceLostError, match="no device is left"):
        together([bench], found, store)
    assert [record.workload for record in store.records()] == [found[0].workload]


def test_a_candidate_that_takes_devices_with_it_is_given_up() -> None:
    """Two of four are lost: with its batch, then with it alone."""
    store, found, benches = Store.empty(), tasks(1.0), [faster_at(3) for _ in range(4)]
    for bench in benches:
        bench.loses = lambda points: Point(5) in points
    outcome = together(benches, found, store)
    (row,) = outcome.rows
    assert row.tried == row.space == 60 and row.configuration == settings(Point(3))
    assert sum("2 devices were lost with it on them" in failure for failure in outcome.failures) == 1
    assert outcome.failures.count("the device is gone") == 2


def test_an_error_on_one_device_ends_the_others() -> None:
    class Full(Store):
        def append(self, record: Record) -> None:
            raise WriteError("the disk is full")

    benches = [faster_at(3), faster_at(3)]
    with pytest.raises(WriteError, match="the disk is full"):
        together(benches, tasks(0.6, 0.4, 0.1), Full(None))
    assert all(bench.closed for bench in benches)
