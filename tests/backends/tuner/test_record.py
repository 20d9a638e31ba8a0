"""A record is one line, and no other line is that record."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import replace
from typing import Any

import pytest

from graphopt.backends.tuner.record import Hardware, Parameter, Record, Workload
from graphopt.errors import UsageError
from tests.backends.tuner.records import HARDWARE, PROVENANCE, is_its_own, make_record

ALPHABET = ["a", "B", "0", " ", "=", "#", '"', "\\", "\n", "\0", "é", "中", "\ud800", "😀", "}", ", "]


def random_text() -> str:
    return "".join(random.choices(ALPHABET, k=random.randrange(6)))


def random_record() -> Record:
    parameters: dict[str, Any] = {
        random_text(): random.choice([random.randrange(-(2**70), 2**70), random_text(), True, False, 0, 1])
        for _ in range(random.randrange(5))
    }
    settings = parameters | {random_text(): random.uniform(-1e300, 1e300), "tiny": 5e-324}
    seconds = 10 ** random.uniform(-12, 6)
    return Record(
        Workload.of(random_text(), parameters), HARDWARE, settings, seconds, 1e-3, PROVENANCE | {"x": random_text()}
    )


def checked(value: Any) -> bytes:
    """A line with a right checksum, whatever it says."""
    body = json.dumps(value)[:-1].encode()
    return body + b', "crc32": "%08x"}' % zlib.crc32(body)


def test_random_records_survive_their_line() -> None:
    for _ in range(500):
        record = random_record()
        line = record.to_line()
        assert line.isascii() and line.count(b"\n") == 1 and line.endswith(b"\n")
        read = Record.from_line(line[:-1])
        assert read == record and read.to_line() == line and read.workload.key == record.workload.key


def test_no_flipped_bit_and_no_cut_goes_unnoticed() -> None:
    line = make_record(n=1).to_line()[:-1]
    for place in range(len(line)):
        for bit in range(8):
            with pytest.raises(UsageError):
                Record.from_line(line[:place] + bytes([line[place] ^ (1 << bit)]) + line[place + 1 :])
        with pytest.raises(UsageError):
            Record.from_line(line[:place])
        with pytest.raises(UsageError):
            Record.from_line(line[place + 1 :])


def test_two_records_glued_together_are_none() -> None:
    with pytest.raises(UsageError):
        Record.from_line(make_record(n=1).to_line()[:-1] + make_record(n=2).to_line()[:-1])


def test_a_record_cannot_be_given_to_another_workload() -> None:
    value = make_record(n=1).to_json()
    assert Record.from_line(checked(value)) == make_record(n=1)
    value["workload"]["parameters"] = {"n": 2}
    with pytest.raises(UsageError, match="that of another workload than gemm n=2"):
        Record.from_line(checked(value))


def test_workloads_that_python_or_a_reader_takes_for_equal_have_keys_of_their_own() -> None:
    values: list[dict[str, Any]] = [
        *({"n": 1}, {"n": True}, {"n": "1"}, {"n": "true"}, {"n": "?"}, {"n": 1, "m": 1}, {"m": "1 n=1"}, {}),
        *({"m=1 n": 1}, {"n ": 1}, {"N": 1}),
    ]
    keys = {Workload.of(rule, value).key for value in values for rule in ("gemm", "gemm n=1", "")}
    assert len(keys) == 3 * len(values)


def test_a_key_is_readable_and_the_same_everywhere() -> None:
    parameters: dict[str, Parameter] = {"rows": "?", "n": 384, "relu": True}
    key = Workload.of("packed-gemm", parameters).key
    assert key == "packed-gemm n=384 relu=true rows=? #3f925742bb31f86a"
    assert Workload.of("packed-gemm", dict(sorted(parameters.items()))).key == key


def damaged_values() -> list[Any]:
    """Every place in the JSON of a record with every kind of wrong value, or with nothing."""
    wrong: list[Any] = [
        None,
        [],
        {},
        "x",
        -1,
        0,
        float("nan"),
        float("inf"),
        10**400,
        True,
        [["a", 1]],
        {"a": None},
        {"a": []},
    ]
    found: list[Any] = [*wrong, 10**30]

    def visit(path: tuple[str, ...], value: Any) -> None:
        for name in value:
            for other in wrong:
                changed = json.loads(json.dumps(make_record(n=1).to_json()))
                inner = changed
                for step in path:
                    inner = inner[step]
                inner[name] = other
                found.append(json.loads(json.dumps(changed)))
                inner.pop(name)
                found.append(changed)
            if isinstance(value[name], dict):
                visit((*path, name), value[name])

    visit((), make_record(n=1).to_json())
    return found


def test_wrong_json_with_a_right_checksum_is_refused_or_a_whole_record() -> None:
    accepted = 0
    for value in damaged_values():
        try:
            record = Record.from_line(checked(value))
        except UsageError:
            continue
        accepted += 1
        assert Record.from_line(record.to_line()[:-1]) == record and record.workload == make_record(n=1).workload
    assert accepted < 40  # a configuration, seconds or provenance may be others


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_json_is_refused(depth: int) -> None:
    body = b'{"workload": ' + b"[" * depth + b"]" * depth
    with pytest.raises(UsageError):
        Record.from_line(body + b', "crc32": "%08x"}' % zlib.crc32(body))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_times_that_are_none(seconds: float) -> None:
    with pytest.raises(UsageError, match=r"seconds of gemm n=1 is .*; give a finite number above 0"):
        make_record(seconds, n=1)
    with pytest.raises(UsageError, match="default_seconds of gemm"):
        replace(make_record(), default_seconds=seconds)


@pytest.mark.parametrize("value", [None, 1.5, [1], float("nan")])
def test_parameters_are_integers_words_and_truths(value: Any) -> None:
    with pytest.raises(UsageError, match="parameter 'n' of gemm is"):
        Workload.of("gemm", {"n": value})


@pytest.mark.parametrize("value", [None, [1], {}, float("nan")])
def test_settings_are_json_scalars(value: Any) -> None:
    with pytest.raises(UsageError, match="setting 'tile' of gemm is"):
        replace(make_record(), configuration={"tile": value})


def test_what_a_record_must_name() -> None:
    with pytest.raises(UsageError, match="lacks device or date"):
        replace(make_record(), provenance={"date": PROVENANCE["date"]})
    with pytest.raises(UsageError, match="has no time zone"):
        make_record(about={"date": "2026-01-31"})
    with pytest.raises(UsageError, match="'yesterday' cannot be read"):
        make_record(about={"date": "yesterday"})
    with pytest.raises(UsageError, match="names no CPU features"):
        make_record(hardware=replace(HARDWARE, features=()))


def test_unsorted_names_are_refused() -> None:
    with pytest.raises(UsageError, match="give each once, sorted"):
        Workload("gemm", (("n", 1), ("m", 1)))
    with pytest.raises(UsageError, match="give each once, sorted"):
        Hardware("cpu", ("b", "a"), 1, "0")
    with pytest.raises(UsageError, match="give each once, sorted"):
        Hardware("cpu", ("a b",), 1, "0")
    with pytest.raises(UsageError, match="threads is 0"):
        Hardware("cpu", (), 0, "0")


def test_the_helper_tells_mixed_up_records() -> None:
    assert is_its_own(make_record(n=1)) and not is_its_own(replace(make_record(n=1), configuration={"n": 2}))
