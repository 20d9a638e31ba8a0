"""Many processes at one store, some of which are killed: nothing that was committed is lost or mixed up."""

from __future__ import annotations

import random
from pathlib import Path

from graphopt.backends.tuner.store import NAME, Store
from tests.backends.tuner.processes import start
from tests.backends.tuner.records import HARDWARE, is_its_own, make_record

WRITERS = 8
EACH = 200


def test_eight_writers_while_others_read_prune_and_merge(tmp_path: Path) -> None:
    other = Store.empty()
    for number in range(50):
        other.append(make_record(other=number))
    running = [start("write", tmp_path, f"writer {index}", EACH) for index in range(WRITERS)]
    store, seen = Store(tmp_path), 0
    while any(process.poll() is None for process in running):
        found = store.records()
        assert len(found) >= seen and store.damaged == 0
        seen = len(found)
        store.prune()
        store.merge(other)
    assert [process.wait() for process in running] == [0] * WRITERS
    for process in running:
        process.communicate()
    expected = {
        make_record(writer=f"writer {index}", number=n).to_line() for index in range(WRITERS) for n in range(EACH)
    }
    expected |= {record.to_line() for record in other.records()}
    store.merge(other)
    assert sorted(record.to_line() for record in store.records()) == sorted(expected)
    assert all(map(is_its_own, store.records())) and store.damaged == 0


def test_a_reader_sees_every_record_as_soon_as_it_is_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with start("write", tmp_path, "writer", 100) as process:
        assert process.stdout
        for line in process.stdout:
            record = make_record(writer="writer", number=int(line))
            assert store.lookup(record.workload, HARDWARE) == record
    assert len(store.records()) == 100


def test_writers_killed_at_any_time(tmp_path: Path) -> None:
    committed = []
    for life in range(10):
        with start("write", tmp_path, f"life {life}", 10**6) as process:
            assert process.stdout
            for _ in range(random.randrange(1, 20)):
                committed.append(make_record(writer=f"life {life}", number=int(process.stdout.readline())))
            process.kill()
            committed += [make_record(writer=f"life {life}", number=int(line)) for line in process.stdout]
    store = Store(tmp_path)
    assert all(store.lookup(record.workload, HARDWARE) == record for record in committed)
    assert all(map(is_its_own, store.records()))
    assert len(store.records()) <= len(committed) + 10  # the last of each life may be there without having been told


def test_a_writer_killed_at_every_byte(tmp_path: Path) -> None:
    with start("killed_in_append", tmp_path) as process:
        assert process.wait() == 0
    store = Store(tmp_path)
    size = len(make_record(killed=0).to_line())
    whole = [record for record in store.records() if record != make_record(killed=0)]
    assert whole == [make_record(whole=size) for size in range(size + 1)]
    assert len(store.records()) == len(whole) + 2  # killed before or after the newline: the record is whole
    assert store.damaged == size - 2  # and before the first byte there is nothing
    store.prune()
    assert (len(store.records()), store.damaged) == (len(whole) + 1, 0)


def test_a_prune_killed_at_every_step(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(5):
        store.append(make_record(2e-5, number=number))
        store.append(make_record(1e-5, number=number))
    with start("killed_in_prune", tmp_path) as process:
        out, _ = process.communicate()
    assert process.returncode == 0 and int(out) > 5
    expected = [
        *(make_record(number=number) for number in range(5)),
        *(make_record(whole=n + 1) for n in range(int(out))),
    ]
    assert list(store.records()) == expected
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    size = 10_000
    with start("limited", tmp_path, size) as process:
        out, _ = process.communicate()
    count, _, message = out.partition(" ")
    assert message == f"cannot write {tmp_path / NAME}: File too large; make room\n"
    store = Store(tmp_path)
    assert list(store.records()) == [make_record(number=number) for number in range(int(count))]
    line = len(make_record(number=int(count)).to_line())
    assert store.damaged == 0 and size - line < (tmp_path / NAME).stat().st_size <= size
    store.append(make_record(after=True))
    assert store.records()[-1] == make_record(after=True)
