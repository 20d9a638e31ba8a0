"""What is found again, which of several records is best, and what happens to damaged ones."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from graphopt.backends.tuner.record import Hardware, Record
from graphopt.backends.tuner.store import NAME, SHIPPED, Change, Store, parse, shipped, user_folder
from graphopt.errors import GraphoptError, UnknownNameError, UsageError, WriteError
from tests.backends.tuner.processes import ROOT
from tests.backends.tuner.records import HARDWARE, is_its_own, lines_of, make_record

ANY = replace(HARDWARE, features=())
OTHER_CPU = replace(HARDWARE, features=("avx512_bf16", "avx512f", "fma", "x86_64"))


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path) if request.param == "folder" else Store.empty()


def test_the_best_record_is_found(store: Store) -> None:
    workload = make_record(n=1).workload
    assert store.lookup(workload, HARDWARE) is None
    for seconds in (1.1e-5, 0.9e-5, 1.0e-5):
        store.append(make_record(seconds, n=1))
    store.append(make_record(0.1e-5, n=2))
    assert store.lookup(workload, HARDWARE) == make_record(0.9e-5, n=1)
    assert store.lookup(make_record(n=3).workload, HARDWARE) is None
    assert store.lookup(make_record(n=True).workload, HARDWARE) is None


def test_the_best_is_the_one_that_gained_most_on_its_default(store: Store) -> None:
    """The faster one was measured while everything was faster."""
    throttled, fast = replace(make_record(n=1), seconds=2e-5, default_seconds=4e-5), make_record(1.5e-5, n=1)
    store.append(throttled)
    store.append(fast)
    assert store.lookup(fast.workload, HARDWARE) == throttled


@pytest.mark.parametrize(
    "other",
    [
        replace(HARDWARE, target="cpu:x86-64-v3"),
        replace(HARDWARE, features=("fma",)),
        replace(HARDWARE, threads=1),
        replace(HARDWARE, tvm="0.28"),
    ],
)
def test_a_record_is_for_its_hardware_only(store: Store, other: Hardware) -> None:
    store.append(make_record(n=1))
    assert store.lookup(make_record(n=1).workload, other) is None


def test_for_a_machine_that_is_not_at_hand_any_cpu_of_the_target_will_do(store: Store) -> None:
    here, there = make_record(1e-5, n=1), make_record(0.5e-5, OTHER_CPU, n=1)
    store.append(here)
    store.append(there)
    assert store.lookup(here.workload, HARDWARE) == here
    assert store.lookup(here.workload, ANY) == there
    assert store.lookup(here.workload, replace(ANY, threads=1)) is None


def test_the_users_records_come_before_those_that_ship(tmp_path: Path) -> None:
    fallback = parse(lines_of(make_record(0.1e-5, n=1), make_record(0.1e-5, n=2)))
    store = Store(tmp_path, shipped=fallback)
    store.append(make_record(1e-5, n=1))
    assert store.lookup(make_record(n=1).workload, HARDWARE) == make_record(1e-5, n=1)
    assert store.lookup(make_record(n=2).workload, HARDWARE) == make_record(0.1e-5, n=2)
    assert store.records() == (make_record(1e-5, n=1),)
    store.export(tmp_path / "exported")
    assert (tmp_path / "exported").read_bytes() == lines_of(make_record(1e-5, n=1))


def test_what_ships_can_be_read() -> None:
    assert shipped().damaged == 0
    assert SHIPPED.read_bytes() == lines_of(*shipped().records)
    assert len(shipped().best) >= len({(record.workload.key, record.hardware) for record in shipped().records})


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert user_folder() == tmp_path / "home" / ".cache" / "graphopt" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store.user().shipped is shipped() and Store.user().records() == ()
    Store.user().append(make_record(n=1))
    assert Store(tmp_path / "cache" / "graphopt" / "tuning").records() == (make_record(n=1),)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        Store.user()


def test_a_file_cut_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    records = [make_record(n=1), make_record(n=2)]
    content, first = lines_of(*records), len(records[0].to_line())
    for size in range(len(content) + 1):
        (tmp_path / NAME).write_bytes(content[:size])
        store = Store(tmp_path)
        whole = (size >= first) + (size == len(content))
        assert (list(store.records()), store.damaged) == (records[:whole], 0)
        store.append(make_record(n=3))
        found = list(store.records())
        lacks_newline = size + 1 in (first, len(content))  # all of the record is there, and the writer ends the line
        assert found == [*records[: whole + lacks_newline], make_record(n=3)]
        assert store.damaged == (size not in (0, first, len(content)) and not lacks_newline)


def test_every_flipped_bit_costs_no_other_record_but_the_next(tmp_path: Path) -> None:
    records = [make_record(n=number) for number in range(3)]
    content = lines_of(*records)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.randrange(8)
        found = parse(bytes(flipped))
        newline = content[place : place + 1] == b"\n"  # without it two lines are one
        assert set(map(Record.to_line, found.records)) < set(map(Record.to_line, records))
        assert len(found.records) >= (1 if newline else 2) and found.damaged >= (place + 1 < len(content))


def test_rubbish_between_records(tmp_path: Path) -> None:
    rubbish = [b"", b"\r", b"null", b"[]", b"{}", b'{"a', b"\xff\xfe", b"\0" * 4096, b"[" * 100_000, b'{"n": NaN}']
    one, two = make_record(n=1), make_record(n=2)
    random.shuffle(rubbish)
    (tmp_path / NAME).write_bytes(b"\n".join([*rubbish, one.to_line(), *rubbish, two.to_line(), b"tail"]))
    store = Store(tmp_path)
    assert store.records() == (one, two) and store.damaged == 2 * (len(rubbish) - 1)
    assert store.lookup(one.workload, HARDWARE) == one
    assert store.prune() == Change(0, 2 * (len(rubbish) - 1))
    assert (tmp_path / NAME).read_bytes() == lines_of(one, two)


def test_random_changes_of_a_file_never_give_a_record_to_another_workload() -> None:
    content = lines_of(*(make_record(n=number, words="?" * number) for number in range(4)))
    known = {line + b"\n" for line in content.splitlines()}
    for _ in range(2000):
        changed = bytearray(content)
        for _ in range(random.randrange(1, 4)):
            start, end = sorted(random.choices(range(len(changed) + 1), k=2))
            piece = changed[start : min(end, start + random.randrange(400))]
            place = random.randrange(len(changed) + 1)
            changed[place : place + random.randrange(400)] = piece
        found = parse(bytes(changed))
        assert {record.to_line() for record in found.records} <= known and all(map(is_its_own, found.records))


def test_two_stores_in_one_process_see_each_other(tmp_path: Path) -> None:
    one, two = Store(tmp_path), Store(tmp_path)
    for number in range(3):
        one.append(make_record(n=number))
        assert two.lookup(make_record(n=number).workload, HARDWARE) == make_record(n=number)
        two.prune()
        assert len(one.records()) == number + 1


def test_merging_adds_what_is_new(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    for number in (1, 1, 2):
        other.append(make_record(n=number))
    with (tmp_path / "other" / NAME).open("ab") as stream:
        stream.write(b"rubbish\n")
    store.append(make_record(n=2))
    assert store.merge(other) == Change(1, 1)
    assert store.records() == (make_record(n=2), make_record(n=1)) and store.damaged == 0
    assert store.merge(other) == Change(0, 1) and store.merge(store) == Change(0, 0)


def test_pruning_keeps_the_best(store: Store) -> None:
    for number in (1, 2):
        for seconds in (1.1e-5, 0.9e-5, 1.0e-5):
            store.append(make_record(seconds, n=number))
    store.append(make_record(1.2e-5, OTHER_CPU, n=1))
    assert store.prune() == Change(4, 0)
    expected = (make_record(0.9e-5, n=1), make_record(0.9e-5, n=2), make_record(1.2e-5, OTHER_CPU, n=1))
    assert store.records() == expected
    assert store.prune() == Change(0, 0) and store.records() == expected


def test_pruning_by_age_and_device(store: Store) -> None:
    old, new = {"date": "2025-12-31T23:30:00-01:00"}, {"date": "2026-01-01T01:00:00+00:00"}
    for number, about in enumerate([old, new, new | {"device": "a board"}]):
        store.append(make_record(n=number, about=about))
    with pytest.raises(UnknownNameError, match=r"unknown device 'a bord'; did you mean 'a board'\?"):
        store.prune(devices=["a bord"])
    assert len(store.records()) == 3
    assert store.prune(before=datetime(2026, 1, 1, 0, 45, tzinfo=UTC)) == Change(1, 0)
    assert store.prune(devices=["a board"]) == Change(1, 0)
    assert store.records() == (make_record(n=1, about=new),)


def test_a_better_record_of_a_dropped_device_does_not_take_others_with_it(store: Store) -> None:
    store.append(make_record(1e-5, n=1))
    store.append(make_record(0.5e-5, n=1, about={"device": "a board"}))
    store.prune(devices=["a board"])
    assert store.records() == (make_record(1e-5, n=1),)


def test_export_and_import(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        store.append(make_record(n=number, words="ä\n"))
    path = tmp_path / "exported.jsonl"
    assert store.export(path) == Change(3, 0)
    other = Store(tmp_path / "other")
    assert other.import_(path) == Change(3, 0) and other.records() == store.records()
    assert other.import_(path) == Change(0, 0)
    path.write_bytes(path.read_bytes()[:-10])
    again = Store.empty()
    assert again.import_(path) == Change(2, 1) and again.records() == store.records()[:2]


def test_an_export_needs_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.append(make_record(n=1))
    (tmp_path / "link").symlink_to(NAME)
    for path in (tmp_path / NAME, tmp_path / "link"):
        with pytest.raises(UsageError, match="is the store itself"):
            store.export(path)
    with pytest.raises(WriteError, match="No such file or directory"):
        store.export(tmp_path / "no" / "file")


@pytest.mark.parametrize("content", [None, b"no record\n", b"\x7fELF" + bytes(1000)])
def test_files_that_hold_no_records(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match="give a file that an export wrote"):
        Store.empty().import_(tmp_path / "file")


def test_a_store_behind_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the same after the current folder changed, and pruning keeps the link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    store = Store("link")
    monkeypatch.chdir("/")
    store.append(make_record(n=1))
    store.prune()
    assert (tmp_path / "link").is_symlink() and Store(tmp_path / "real").records() == (make_record(n=1),)


def test_errors_of_the_disk_are_our_own(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    store = Store(tmp_path)
    for action in (
        store.records,
        store.prune,
        lambda: store.append(make_record(n=1)),
        lambda: store.merge(Store.empty()),
    ):
        with pytest.raises(GraphoptError, match=r"cannot (read|write) .*: Is a directory; "):
            action()


def test_importing_the_store_needs_the_standard_library_only() -> None:
    modules = "graphopt.backends.tuner.store, graphopt.backends.tuner.machine"
    code = f"import sys, {modules}; print({{'torch', 'tvm', 'tvm_ffi', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
