"""A file that many processes append lines to, which no crash, full disk or second writer can harm.

Writers take turns by `flock`, which the kernel releases when a process dies. Lines are appended and flushed to the disk
before `append` returns; when the disk refuses, the file is cut back to what it held. A line that a killed writer left
unfinished is ended by the next writer, so that it never runs into a whole one. `rewrite` replaces the file by renaming.
Readers take no lock: all up to the last newline is whole, or was left behind by a killed writer, which only the content
can tell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from graphopt.errors import UsageError, WriteError

WAIT = 60.0  # seconds for another writer, which needs milliseconds unless it was stopped
_RETRY = 0.005

State = tuple[int, ...]


class RecordFile:
    """Lines in the file at `path`; a file or folder that is missing is no lines, and is made by the first writer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def state(self) -> State:
        """Differs after every change of the file. Raises UsageError where it cannot be read."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return ()
        except OSError as e:
            raise self._unreadable(e) from e
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self) -> bytes:
        """All finished lines. Raises UsageError where it cannot be read."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as e:
            raise self._unreadable(e) from e
        return content[: content.rfind(b"\n") + 1]

    def append(self, lines: bytes) -> None:
        """Add whole lines, on the disk when this returns. Raises WriteError, and then none of them is there."""
        if not lines:
            return
        with writing(self.path), self._locked() as handle:
            size = os.fstat(handle).st_size
            unfinished = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            try:
                _write(handle, b"\n" * unfinished + lines)
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, size)
                raise

    def rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """Put change(all finished lines) in their place, at once. Raises WriteError, and then all is as before."""
        if not self.state():
            return
        with writing(self.path), self._locked() as handle:
            fresh = self.path.with_name(f"{self.path.name}.new")  # what a killed process left there is written over
            _replace(self.path, fresh, change(self.read()), os.fstat(handle).st_mode & 0o777)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, open for appending and this writer's alone."""
        deadline = time.monotonic() + WAIT
        while True:
            handle = self._open()
            try:
                if self._lock(handle, deadline):
                    yield handle
                    return
            finally:
                os.close(handle)  # releases the lock

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        with contextlib.suppress(FileNotFoundError):
            return os.open(self.path, flags)
        _make_folder(self.path.parent)
        handle = os.open(self.path, flags | os.O_CREAT, 0o666)
        _flush_folder(self.path.parent)
        return handle

    def _lock(self, handle: int, deadline: float) -> bool:
        """Wait for the lock; False where the file was replaced or removed meanwhile."""
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                if time.monotonic() > deadline:
                    why = f"another process has been writing to it for {WAIT:.0f} s; end that one"
                    raise WriteError(f"cannot write {self.path}: {why}") from e
                time.sleep(_RETRY)
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _unreadable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot read {self.path}: {error.strerror or error}; repair that or use another folder")


class MemoryFile:
    """The same without a file: what is appended is gone with the process."""

    def __init__(self) -> None:
        self._lines = b""

    def state(self) -> State:
        """Differs after every change."""
        return (hash(self._lines),)

    def read(self) -> bytes:
        """All lines."""
        return self._lines

    def append(self, lines: bytes) -> None:
        """Add whole lines."""
        self._lines += lines

    def rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """Put change(all lines) in their place."""
        self._lines = change(self._lines)


def write_whole(path: Path, lines: bytes) -> None:
    """Make or replace the file at `path`, at once. Raises WriteError, and what was there before is untouched."""
    with writing(path):
        _replace(path, path.with_name(f".graphopt-{secrets.token_hex(8)}.tmp"), lines)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system become WriteError with the path in it."""
    try:
        yield
    except OSError as e:
        hint = "make room" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "use another folder"
        raise WriteError(f"cannot write {path}: {e.strerror or e}; {hint}") from e


def _replace(path: Path, fresh: Path, content: bytes, mode: int | None = None) -> None:
    try:
        with open(fresh, "wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        raise
    _flush_folder(path.parent)


def _write(handle: int, content: bytes) -> None:
    """All of it: a disk that fills up takes a part first and refuses the rest."""
    while content:
        content = content[os.write(handle, content) :]


def _make_folder(path: Path) -> None:
    """The folder and those above it that are missing, durable each."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    """Make a new name in the folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
