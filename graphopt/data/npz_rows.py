"""Rows of the arrays in an .npz file, read in order and never all at once; nothing in it is ever unpickled."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np

from graphopt.errors import UsageError

Array = np.ndarray[Any, Any]
_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class ArrayHeader:
    """Shape, type and order of one array; `offset` is where its values begin in the uncompressed member."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int


@dataclass(frozen=True)
class NpzFile:
    """An .npz file by its headers; `count` is the length of the first axis, equal for all arrays."""

    path: str
    arrays: Mapping[str, ArrayHeader]
    count: int


def open_npz(path: str) -> NpzFile:
    """Read the headers. Raises UsageError where it is no .npz of plain arrays of one length."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        arrays = {name.removesuffix(".npy"): _read_header(archive, name, path) for name in members}
    if not arrays:
        raise UsageError(f"{path} holds no arrays; write one with numpy.savez(path, name=array)")
    for name, header in arrays.items():
        if not header.shape:
            raise UsageError(f"{path}: array {name!r} has no axes; its first axis must count samples")
    lengths = {name: header.shape[0] for name, header in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(
            f"{path}: the arrays differ in length ({listed}); their first axis must count the same samples"
        )
    return NpzFile(path, arrays, next(iter(lengths.values())))


def _read_header(archive: zipfile.ZipFile, member: str, path: str) -> ArrayHeader:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise UsageError(f"{path}: array {member!r} has fields; save arrays of plain numbers")
        shape, fortran, dtype = _HEADERS[version](stream)
        if dtype.hasobject:
            raise UsageError(f"{path}: array {member!r} holds Python objects; save arrays of plain numbers")
        return ArrayHeader(tuple(shape), dtype, fortran, stream.tell())


class RowReader:
    """An open file whose rows are cheap to read forwards; an array in Fortran order has none and is read whole."""

    def __init__(self, file: NpzFile) -> None:
        self.file = file
        self.streams: dict[str, IO[bytes]] = {}
        self.whole: dict[str, Array] = {}

    def __enter__(self) -> RowReader:
        with _reading(self.file.path):
            self.archive = zipfile.ZipFile(self.file.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self.streams.values():
            stream.close()
        self.archive.close()

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of an array. Raises UsageError where the file is damaged or has changed."""
        header = self.file.arrays[name]
        with _reading(self.file.path):
            if header.fortran:
                return self._read_whole(name)[start:stop]
            if name not in self.streams:
                self.streams[name] = self.archive.open(f"{name}.npy")
            shape = (stop - start, *header.shape[1:])
            row = math.prod(header.shape[1:]) * header.dtype.itemsize
            stream = self.streams[name]
            stream.seek(header.offset + start * row)
            content = stream.read((stop - start) * row)
            if len(content) < (stop - start) * row:
                raise EOFError("it ends too early")
            return np.ndarray(shape, header.dtype, buffer=content)

    def _read_whole(self, name: str) -> Array:
        if name not in self.whole:
            with self.archive.open(f"{name}.npy") as stream:
                self.whole[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return self.whole[name]


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}; give an .npz file that you may read") from e
    except _UNREADABLE as e:
        raise UsageError(
            f"{path} is no .npz of plain arrays ({e}); write one with numpy.savez(path, name=array)"
        ) from e
