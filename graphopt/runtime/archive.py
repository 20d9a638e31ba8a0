"""Reading the members of an artifact, a zip or a folder, without copying and without trusting a single field.

Zip members must be uncompressed; every offset and size is checked against the file before it is used.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graphopt.errors import ArtifactError
from graphopt.runtime.manifest import MANIFEST

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_LIMIT = 0xFFFFFFFF
_END, _CENTRAL, _LOCAL = struct.Struct("<4sHHHHIIH"), struct.Struct("<4sHHHHHHIIIHHHHHII"), struct.Struct("<4s22sHH")
_LOCATOR, _END64 = struct.Struct("<4sIQI"), struct.Struct("<4sQHHIIQQQQ")
_ENCRYPTED = 1


def check_name(name: str) -> str:
    """Member names are relative paths of plain characters: no "..", no leading dot or slash, nothing but ASCII."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} cannot name a member of an artifact; use letters, digits, '.', '_', '-' and '/'")
    return name


class _Damaged(Exception):
    """Says what is wrong with the file; the caller adds which file."""


@dataclass(frozen=True)
class Archive:
    """`members` are views of memory-mapped files, valid as long as anything refers to them."""

    path: str
    members: Mapping[str, memoryview]

    def member(self, name: str) -> memoryview:
        """The bytes of a member; raises ArtifactError when it is not there."""
        if name not in self.members:
            raise ArtifactError(f"{self.path} has no member {name}; it is incomplete, get it again")
        return self.members[name]


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Open a zip or a folder; raises ArtifactError when it is no artifact, truncated or altered."""
    text = os.fspath(path)
    try:
        if os.path.isdir(text):
            return Archive(text, _Folder(text))
        return Archive(text, _read_zip(_map(text)))
    except _Damaged as e:
        raise ArtifactError(f"{text} {e}") from e
    except OSError as e:
        raise ArtifactError(f"cannot open {text}: {e.strerror or e}") from e


def _map(path: str) -> memoryview:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Folder(Mapping[str, memoryview]):
    """Files of a folder, mapped when asked for."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: dict[str, memoryview] = {}
        if MANIFEST not in self:
            raise _Damaged(f"is no artifact: there is no {MANIFEST} in it")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and os.path.isfile(os.path.join(self._path, check_name(name)))

    def __getitem__(self, name: str) -> memoryview:
        if name not in self:
            raise KeyError(name)
        if name not in self._open:
            self._open[name] = _map(os.path.join(self._path, name))
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(os.listdir(self._path))

    def __len__(self) -> int:
        return len(os.listdir(self._path))


def _read_zip(data: memoryview) -> dict[str, memoryview]:
    if bytes(data[:4]) != b"PK\3\4":
        raise _Damaged("is no artifact; make one with `graphopt compile`" if len(data) else "is empty")
    members: dict[str, memoryview] = {}
    try:
        start, size, count = _find_directory(data)
        position, free_from = start, 0
        for _ in range(count):
            name, crc, offset, length, position = _read_entry(data, position, start + size)
            begin = _find_data(data, name, offset)
            if name in members:
                raise _Damaged(f"is altered: it has two members named {name}")
            if offset < free_from or begin + length > start:
                raise _Damaged(f"is altered: member {name} lies over another one")
            free_from = begin + length
            members[name] = data[begin:free_from]
            if name == MANIFEST and zlib.crc32(members[name]) != crc:
                raise _Damaged(f"is altered: {MANIFEST} has another checksum than the archive's directory says")
    except (struct.error, UnicodeDecodeError) as e:
        raise _Damaged("is truncated or altered: its directory cannot be read; get it again") from e
    if MANIFEST not in members:
        raise _Damaged(f"is no artifact: there is no {MANIFEST} in it")
    return members


def _find_directory(data: memoryview) -> tuple[int, int, int]:
    """Start, size and number of entries of the zip's directory, which ends where the file does."""
    end = len(data) - _END.size
    if end < 0 or bytes(data[end : end + 4]) != b"PK\5\6":
        raise _Damaged("is truncated: the end of the archive is missing; get it again")
    _, _, _, _, count, size, start, _ = _END.unpack_from(data, end)
    if _LIMIT in (size, start) or count == 0xFFFF:
        _, _, record, _ = _LOCATOR.unpack_from(data, end - _LOCATOR.size)
        signature, _, _, _, _, _, _, count, size, start = _END64.unpack_from(data, record)
        end = record
        if signature != b"PK\6\6":
            raise _Damaged("is altered: its directory is not where the file says; get it again")
    if start + size != end:
        raise _Damaged("is truncated or altered: its directory is not where the file says; get it again")
    return start, size, count


def _read_entry(data: memoryview, position: int, end: int) -> tuple[str, int, int, int, int]:
    """One entry of the directory: name, checksum, offset of the local header, bytes, position of the next entry."""
    fields = _CENTRAL.unpack_from(data, position)
    signature, flags, method, crc, packed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
    name_end = position + _CENTRAL.size + fields[10]
    following = name_end + fields[11] + fields[12]
    if signature != b"PK\1\2" or following > end:
        raise _Damaged("is altered: its directory is damaged; get it again")
    raw = bytes(data[position + _CENTRAL.size : name_end]).decode("ascii")
    if not _NAME.fullmatch(raw):
        raise _Damaged(f"is altered: it has a member named {raw[:80]!r}")
    if method != 0 or flags & _ENCRYPTED:
        raise _Damaged(f"has a compressed or encrypted member, {raw}; members are stored as they are: do not repack it")
    offset = fields[16]
    wide = _zip64(data[name_end : name_end + fields[11]])
    if size == _LIMIT:
        size, packed = wide.pop(0), wide.pop(0)
    if offset == _LIMIT:
        offset = wide.pop(0)
    if size != packed:
        raise _Damaged(f"is altered: member {raw} has two sizes")
    return raw, crc, offset, size, following


def _zip64(extra: memoryview) -> list[int]:
    """The wide sizes and offsets, followed by values that fail every check, so that a missing one is noticed."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            return [*struct.unpack_from(f"<{length // 8}Q", extra, position + 4), *3 * [1 << 64]]
        position += 4 + length
    return 3 * [1 << 64]


def _find_data(data: memoryview, name: str, offset: int) -> int:
    """Where a member's data start; its local header must be there and bear the same name."""
    if offset + _LOCAL.size > len(data):
        raise _Damaged(f"is truncated or altered: member {name} is outside the file; get it again")
    signature, _, name_length, extra_length = _LOCAL.unpack_from(data, offset)
    start: int = offset + _LOCAL.size
    if signature != b"PK\3\4" or bytes(data[start : start + name_length]) != name.encode():
        raise _Damaged(f"is altered: member {name} is not where the directory says; get it again")
    end: int = start + name_length + extra_length
    return end
