"""Writing a set of members as one uncompressed zip or as a folder: reproducible, page-aligned, all or nothing.

Members start at multiples of 4096 bytes, so that a runtime maps them. Everything is written under a temporary name
beside the target, flushed to the disk and renamed: a failure at any point leaves what was there before.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from graphopt.errors import ArtifactError, WriteError
from graphopt.runtime.manifest import MANIFEST, parse

PAGE = 4096
WIDE = 0xFFFFFFFF  # in place of a size or offset: the value is in the zip64 fields
LIMIT = WIDE  # sizes and offsets from here on go there
STORED, UNIX, FILE_MODE = 0, 3, 0o100644
EPOCH = (1 << 5) | 1  # 1980-01-01 in the date format of zip, the earliest there is
ZIP64_ID, PADDING_ID = 0x0001, 0xD935  # 0xD935 is the registered alignment field that zipalign writes


class Sink(Protocol):
    """Takes members one after the other."""

    def add(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> str:
        """Write a member of `size` bytes and return its sha256."""


@contextmanager
def create(path: str | os.PathLike[str]) -> Iterator[Sink]:
    """A sink whose members appear at `path` when the block ends well; "/" at the end of `path` makes a folder.

    Raises WriteError when the disk refuses, or a folder that is no artifact is there; any exception removes the
    temporary and keeps what was there.
    """
    text = os.fspath(path)
    try:
        with _folder(text.rstrip("/") or "/", _is_artifact, "artifact") if text.endswith("/") else _file(text) as sink:
            yield sink
    except OSError as e:
        raise WriteError(f"cannot write {text}: {e.strerror or e}") from e


@contextmanager
def create_folder(path: str | os.PathLike[str], marker: str, kind: str) -> Iterator[Sink]:
    """A sink whose members are files of the folder `path`, in place of one of its `kind`, which holds `marker`.

    `marker` is a file name that nothing else uses. Raises WriteError where something else is there, or the disk
    refuses.
    """
    text = os.fspath(path).rstrip("/") or "/"
    try:
        with _folder(text, lambda folder: os.path.exists(os.path.join(folder, marker)), kind) as sink:
            yield sink
    except OSError as e:
        raise WriteError(f"cannot write {text}/: {e.strerror or e}") from e


@contextmanager
def _file(path: str) -> Iterator[Sink]:
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise WriteError(f"cannot write {path}: it is a folder; give a file name, or end the path with '/'")
    if os.path.exists(target) and not os.path.isfile(target):
        raise WriteError(f"cannot write {path}: it is a device or a pipe; give the name of a regular file")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".graphopt-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            sink = ZipSink(file)
            yield sink
            sink.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _flush(folder)


@contextmanager
def _folder(path: str, of_its_kind: Callable[[str], bool], kind: str) -> Iterator[Sink]:
    target = os.path.realpath(path)
    if os.path.exists(target) and not (os.path.isdir(target) and (not os.listdir(target) or of_its_kind(target))):
        raise WriteError(f"cannot write {path}/: it exists and is no {kind}; give another name or remove it")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".graphopt-{secrets.token_hex(8)}.tmp")
    retired = temporary + ".old"
    try:
        os.mkdir(temporary)
        yield FolderSink(temporary)
        for inner, _, _ in os.walk(temporary):
            _flush(inner)
        if os.path.exists(target):
            os.rename(target, retired)
        os.rename(temporary, target)
    except BaseException:
        if os.path.exists(retired) and not os.path.exists(target):
            os.rename(retired, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
    _flush(folder)


def _is_artifact(folder: str) -> bool:
    """Files of that name are common, so that only one with everything in it that is ours will do."""
    try:
        parse((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ArtifactError):
        return False
    return True


def _flush(folder: str) -> None:
    """Make a rename inside the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderSink:
    """Members as files of a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def add(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> str:
        """Write one file and flush it."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            digest, _ = _copy(file, chunks)
            _check_size(name, size, file.tell())
            file.flush()
            os.fsync(file.fileno())
        return digest


@dataclass(frozen=True)
class _Member:
    name: bytes
    offset: int
    size: int
    crc: int


class ZipSink:
    """Members of a zip, with fixed timestamps; `file` must be seekable: a checksum is known only after its data."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._members: list[_Member] = []

    def add(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> str:
        """Append one member whose data start at a multiple of 4096 bytes."""
        offset = self._file.tell()
        encoded = name.encode("ascii")
        self._file.write(_local_header(_Member(encoded, offset, size, 0)))
        start = self._file.tell()
        digest, crc = _copy(self._file, chunks)
        end = self._file.tell()
        _check_size(name, size, end - start)
        member = _Member(encoded, offset, size, crc)
        self._file.seek(offset)
        self._file.write(_local_header(member))
        self._file.seek(end)
        self._members.append(member)
        return digest

    def finish(self) -> None:
        """Append the directory."""
        start = self._file.tell()
        for member in self._members:
            self._file.write(_central_header(member))
        end = self._file.tell()
        self._file.write(_end(len(self._members), start, end - start))


def _copy(file: IO[bytes], chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
    digest, crc = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
        file.write(chunk)
    return digest.hexdigest(), crc


def _check_size(name: str, expected: int, written: int) -> None:
    if expected != written:
        raise WriteError(f"member {name} was announced with {expected} bytes and came with {written}; report this")


def _local_header(member: _Member) -> bytes:
    large = member.size >= LIMIT
    size = WIDE if large else member.size
    zip64 = struct.pack("<HHQQ", ZIP64_ID, 16, member.size, member.size) if large else b""
    bare = member.offset + 30 + len(member.name) + len(zip64) + 6
    padding = struct.pack("<HHH", PADDING_ID, 2 + -bare % PAGE, PAGE) + bytes(-bare % PAGE)
    extra = zip64 + padding
    fields = (b"PK\3\4", _version(large), 0, STORED, 0, EPOCH, member.crc, size, size, len(member.name), len(extra))
    return struct.pack("<4sHHHHHIIIHH", *fields) + member.name + extra


def _central_header(member: _Member) -> bytes:
    large, far = member.size >= LIMIT, member.offset >= LIMIT
    wide = ([member.size, member.size] if large else []) + ([member.offset] if far else [])
    extra = struct.pack(f"<HH{len(wide)}Q", ZIP64_ID, 8 * len(wide), *wide) if wide else b""
    size, offset = WIDE if large else member.size, WIDE if far else member.offset
    version = _version(large or far)
    fields = (b"PK\1\2", UNIX << 8 | version, version, 0, STORED, 0, EPOCH, member.crc, size, size, len(member.name))
    tail = (len(extra), 0, 0, 0, FILE_MODE << 16, offset)
    return struct.pack("<4sHHHHHHIIIHHHHHII", *fields, *tail) + member.name + extra


def _version(zip64: bool) -> int:
    return 45 if zip64 else 20


def _end(count: int, start: int, size: int) -> bytes:
    large = count >= 0xFFFF or start >= LIMIT or size >= LIMIT
    end = b""
    if large:
        record = (b"PK\6\6", 44, UNIX << 8 | 45, 45, 0, 0, count, count, size, start)
        end = struct.pack("<4sQHHIIQQQQ", *record) + struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
        count, size, start = 0xFFFF, WIDE, WIDE
    return end + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, start, 0)
