"""The store of tuning records: the user's own above what ships with graphopt, any folder, or an empty one in memory.

Any number of processes may read and write one store at once (see `record_file`). Of several records of a workload on
the same hardware the best is the one that gained most on the default measured beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Protocol

from graphopt.backends.tuner.record import Hardware, Record, Workload
from graphopt.backends.tuner.record_file import MemoryFile, RecordFile, State, write_whole
from graphopt.errors import UnknownNameError, UsageError

NAME = "records-1.jsonl"  # the number is the format's: a file of another format is left to another graphopt
SHIPPED = Path(__file__).with_name("common.jsonl")


class Lines(Protocol):
    """Where the lines of a store are: `RecordFile` says what each of these promises."""

    def state(self) -> State: ...

    def read(self) -> bytes: ...

    def append(self, lines: bytes) -> None: ...

    def rewrite(self, change: Callable[[bytes], bytes]) -> None: ...


@dataclass(frozen=True)
class Contents:
    """What lines hold: every record, how many lines are none, and the best record by workload and hardware.

    A hardware without features stands for any CPU.
    """

    records: tuple[Record, ...]
    damaged: int
    best: dict[tuple[str, Hardware], Record]


@dataclass(frozen=True)
class Change:
    """How many records were added, removed or written, and how many damaged lines were left out."""

    records: int
    damaged: int


class Store:
    """Records in the folder `path`, made by the first append; `None` keeps them in memory.

    `shipped` are records to fall back on where the folder has none for a workload and hardware. Reading raises
    UsageError where the folder cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, shipped: Contents | None = None) -> None:
        self.path = None if path is None else Path(os.path.realpath(path))
        self.shipped = shipped or parse(b"")
        self._lines: Lines = MemoryFile() if self.path is None else RecordFile(self.path / NAME)
        self._read: tuple[State, Contents] | None = None

    @classmethod
    def user(cls) -> Store:
        """The user's own store, above the records that ship with graphopt."""
        return cls(user_folder(), shipped=shipped())

    @classmethod
    def empty(cls) -> Store:
        """A store in memory that holds nothing."""
        return cls(None)

    def lookup(self, workload: Workload, hardware: Hardware) -> Record | None:
        """The best committed record; one of the store's own comes before one that ships."""
        place = workload.key, hardware
        return self._contents().best.get(place) or self.shipped.best.get(place)

    def records(self) -> tuple[Record, ...]:
        """All committed records as they were added, without those that ship."""
        return self._contents().records

    @property
    def damaged(self) -> int:
        """Lines that are no record: what a killed writer left behind, or a disk that fails."""
        return self._contents().damaged

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns. Raises WriteError, and then it is not there at all."""
        self._lines.append(record.to_line())

    def merge(self, other: Store) -> Change:
        """Add the records of another store that are not here yet. Raises WriteError."""
        return self._add(other._contents())

    def prune(self, *, before: datetime | None = None, devices: Collection[str] = ()) -> Change:
        """Keep the best record of each workload and hardware, after those measured before a time or on these devices.

        Damaged lines go too. Raises UnknownNameError for a device without records, WriteError.
        """
        removed = Change(0, 0)

        def change(lines: bytes) -> bytes:
            nonlocal removed
            found = parse(lines)
            for device in devices:
                if device not in (known := {record.provenance["device"] for record in found.records}):
                    raise UnknownNameError("device", device, known)
            kept = best_of(
                (record.hardware, record)
                for record in found.records
                if (before is None or record.date >= before) and record.provenance["device"] not in devices
            )
            left = [record for record in found.records if kept.get((record.workload.key, record.hardware)) is record]
            removed = Change(len(found.records) - len(left), found.damaged)
            return b"".join(record.to_line() for record in left)

        self._lines.rewrite(change)
        return removed

    def export(self, path: str | os.PathLike[str]) -> Change:
        """Write all records to another file, a line of JSON each. Raises WriteError, UsageError for the own file."""
        if self.path is not None and Path(os.path.realpath(path)) == self.path / NAME:
            raise UsageError(f"{path} is the store itself, which others may be writing; export to another file")
        found = self._contents()
        write_whole(Path(path), b"".join(record.to_line() for record in found.records))
        return Change(len(found.records), found.damaged)

    def import_(self, path: str | os.PathLike[str]) -> Change:
        """Add the records of an exported file that are not here yet. Raises UsageError, WriteError."""
        try:
            content = Path(path).read_bytes()
        except OSError as e:
            raise UsageError(f"cannot read {path}: {e.strerror or e}; give a file that an export wrote") from e
        found = parse(content)
        if found.damaged and not found.records:
            raise UsageError(f"{path} holds no records; give a file that an export wrote")
        return self._add(found)

    def _add(self, found: Contents) -> Change:
        present = {record.to_line() for record in self.records()}
        lines = {record.to_line(): None for record in found.records}
        new = [line for line in lines if line not in present]
        self._lines.append(b"".join(new))
        return Change(len(new), found.damaged)

    def _contents(self) -> Contents:
        state = self._lines.state()  # before reading: lines that are added meanwhile are read again next time
        if self._read is None or self._read[0] != state:
            self._read = state, parse(self._lines.read())
        return self._read[1]


def parse(lines: bytes) -> Contents:
    """Each line on its own, whatever stands around it; blank ones say nothing."""
    records, damaged = [], 0
    for line in filter(None, lines.split(b"\n")):
        try:
            records.append(Record.from_line(line))
        except UsageError:
            damaged += 1
    anywhere = ((replace(record.hardware, features=()), record) for record in records)
    best = best_of([*((record.hardware, record) for record in records), *anywhere])
    return Contents(tuple(records), damaged, best)


def best_of(found: Iterable[tuple[Hardware, Record]]) -> dict[tuple[str, Hardware], Record]:
    """The best record by key of the workload and hardware; the first of equal ones."""
    best: dict[tuple[str, Hardware], Record] = {}
    for hardware, record in found:
        place = record.workload.key, hardware
        if place not in best or _merit(record) < _merit(best[place]):
            best[place] = record
    return best


def _merit(record: Record) -> tuple[float, float]:
    return record.ratio, record.seconds


@cache
def shipped() -> Contents:
    """The records that come with graphopt, for shapes that many models have."""
    return parse(SHIPPED.read_bytes())


def user_folder() -> Path:
    """$XDG_CACHE_HOME/graphopt/tuning, or ~/.cache/graphopt/tuning. Raises UsageError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard says to ignore a relative one
        return Path(base, "graphopt", "tuning")
    try:
        return Path.home() / ".cache" / "graphopt" / "tuning"
    except RuntimeError as e:
        raise UsageError("no home folder is known; set XDG_CACHE_HOME to the folder for what graphopt keeps") from e
