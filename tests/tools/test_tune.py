"""`graphopt tune`: the store from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backends.tuner.store import NAME, Store, shipped
from tests.backends.tuner.records import make_record
from tests.tools.conftest import Cli


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's store, with two records of one workload and one of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = Store.user()
    store.append(make_record(1.5e-5, n=1))
    store.append(make_record(1e-5, n=1))
    store.append(make_record(0.5e-5, about={"device": "a board"}, n=2))
    return store


def damage(store: Store) -> None:
    assert store.path
    with (store.path / NAME).open("ab") as stream:
        stream.write(b'{"torn\n')


def test_list(cli: Cli, store: Store) -> None:
    outcome = cli("tune", "--list")
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and lines[0].split() == [
        *("workload", "configuration", "us", "default", "us", "target", "threads", "device", "date", "from")
    ]
    assert lines[2].split()[:5] == ["gemm", "n=1", "n=1", "10", "20"] and lines[2].endswith("here")
    assert lines[-1] == f"3 records in {store.path}, {len(shipped().records)} ship with graphopt"


def test_a_damaged_line_is_told(cli: Cli, store: Store) -> None:
    damage(store)
    assert cli("tune", "--list").out.endswith("; 1 damaged line, dropped by --prune\n")
    found = cli("tune", "--list", "--json").json
    assert found["damaged"] == 1 and len(found["records"]) == 3 + len(shipped().records)
    assert found["records"][0] == make_record(1.5e-5, n=1).to_json() | {"shipped": False}
    assert cli("tune", "--export", "x.jsonl").out == "wrote 3 records (1 damaged line left out) to x.jsonl\n"
    assert cli("tune", "--prune").out == f"removed 1 record (1 damaged line left out) from {store.path}\n"
    assert cli("tune", "--list", "--json").json["damaged"] == 0


def test_nothing_stored_yet(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert f"0 records in {tmp_path / 'graphopt' / 'tuning'}" in cli("tune", "--list").out
    assert cli("tune", "--prune", "--json").json["removed"] == 0
    assert list(tmp_path.iterdir()) == []


def test_prune_by_age_and_device(cli: Cli, store: Store) -> None:
    cli("tune", "--prune", "--device", "board").refused("unknown device 'board'", "'a board'")
    assert cli("tune", "--prune", "--older-than", "36500", "--json").json == {
        "store": str(store.path),
        "removed": 1,
        "damaged": 0,
    }
    cli("tune", "--prune", "--device", "a board")
    assert store.records() == (make_record(1e-5, n=1),)
    cli("tune", "--prune", "--older-than", "0.001")
    assert store.records() == ()


def test_export_import_and_merge(cli: Cli, store: Store) -> None:
    assert cli("tune", "--export", "x.jsonl").code == 0
    assert cli("tune", "--store", "new", "--import", "x.jsonl", "--json").json["added"] == 3
    assert Store("new").records() == store.records()
    store.append(make_record(n=3))
    assert cli("tune", "--store", "new", "--merge", store.path).out.startswith("added 1 record to ")
    assert Store("new").records() == store.records()
    assert cli("tune", "--merge", "new").out == f"added 0 records to {store.path}\n"


def test_commands_that_cannot_be_meant(cli: Cli, store: Store) -> None:
    cli("tune").refused("nothing to do", "--list")
    cli("tune", "--list", "--prune").refused("not allowed with argument --list")
    cli("tune", "--list", "--older-than", "3").refused("--older-than has no effect without --prune")
    cli("tune", "--import", "x", "--device", "a").refused("--device has no effect without --prune")
    for days in ("nan", "-1", "1e9"):
        cli("tune", "--prune", "--older-than", days).refused("give a number of days from 0 to 36500")
    cli("tune", "--list", "--store", "no").refused("there is no store in no", NAME)
    cli("tune", "--merge", "no").refused("there is no store in no", NAME)
    cli("tune", "--import", "no").refused("cannot read no: No such file or directory")
    cli("tune", "--export", "no/x.jsonl").refused("no does not exist")
    cli("tune", "--export", store.path / NAME).refused("is the store itself")  # type: ignore[operator]
    Path("x.jsonl").write_bytes(b"")
    cli("tune", "--import", "x.jsonl", "--json", "x.jsonl").refused("would overwrite the input x.jsonl")
    cli("tune", "--export", "y", "--json", "y").refused("both write y")


def test_a_store_that_takes_no_records(cli: Cli, store: Store) -> None:
    cli("tune", "--export", "x.jsonl")
    cli("tune", "--import", "x.jsonl", "--store", "/proc/no").refused(
        f"cannot write /proc/no/{NAME}: No such file or directory; use another folder", code=1
    )
