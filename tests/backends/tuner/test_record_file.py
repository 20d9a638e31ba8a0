"""What a file of lines does when the disk, the folder or another writer is in its way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from graphopt.backends.tuner import record_file
from graphopt.backends.tuner.record_file import RecordFile
from graphopt.errors import UsageError, WriteError


@pytest.fixture
def file(tmp_path: Path) -> RecordFile:
    file = RecordFile(tmp_path / "folder" / "lines")
    file.append(b"one\n")
    return file


def test_lines_are_appended(file: RecordFile) -> None:
    file.append(b"two\nthree\n")
    file.append(b"")
    assert file.read() == b"one\ntwo\nthree\n"


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "folder" / "lines")
    file.rewrite(lambda lines: b"never called\n")
    assert (file.state(), file.read(), list(tmp_path.iterdir())) == ((), b"", [])


def test_an_unfinished_line_is_not_read_and_ended_by_the_next_writer(file: RecordFile) -> None:
    with file.path.open("ab") as stream:
        stream.write(b"tor")
    assert file.read() == b"one\n"
    file.append(b"two\n")
    assert file.read() == b"one\ntor\ntwo\n"


@pytest.mark.parametrize("taken", range(5))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_takes_a_part_of_a_line(
    file: RecordFile, monkeypatch: pytest.MonkeyPatch, taken: int, code: int
) -> None:
    """The kernel writes what fits and says how much that was; the next call fails."""
    real, left = os.write, [taken]

    def write(handle: int, content: bytes) -> int:
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        count = real(handle, content[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(WriteError, match=rf"^cannot write {file.path}: {os.strerror(code)}; "):
        file.append(b"seven\n")
    monkeypatch.undo()
    assert file.path.read_bytes() == b"one\n"
    file.append(b"two\n")
    assert file.path.read_bytes() == b"one\ntwo\n"


def test_a_write_in_parts_is_finished(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[:1]))
    file.append(b"two\n")
    assert file.read() == b"one\ntwo\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_what_did_not_reach_the_disk_is_not_there(
    file: RecordFile, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(os, "fsync", raising(error))
    with pytest.raises((WriteError, KeyboardInterrupt)):
        file.append(b"two\n")
    with pytest.raises((WriteError, KeyboardInterrupt)):
        file.rewrite(lambda lines: b"new\n")
    monkeypatch.undo()
    assert file.read() == b"one\n" and os.listdir(file.path.parent) == ["lines"]


def raising(error: BaseException) -> object:
    def call(*arguments: object) -> None:
        raise error

    return call


def test_rewriting_keeps_the_mode_and_changes_the_state(file: RecordFile) -> None:
    file.path.chmod(0o660)
    before = file.state()
    file.rewrite(lambda lines: lines.replace(b"one", b"two"))
    assert file.read() == b"two\n" and file.state() != before
    assert file.path.stat().st_mode & 0o777 == 0o660


def test_what_a_killed_rewrite_left_is_no_hindrance(file: RecordFile) -> None:
    file.path.with_name("lines.new").write_bytes(b"half of i")
    file.rewrite(lambda lines: lines + b"two\n")
    assert file.read() == b"one\ntwo\n" and os.listdir(file.path.parent) == ["lines"]


def test_a_writer_that_waited_for_a_rewrite_appends_to_the_new_file(file: RecordFile) -> None:
    """The waiting one has opened the file that is about to be replaced."""
    writer = threading.Thread(target=file.append, args=(b"two\n",))

    def change(lines: bytes) -> bytes:
        opened = os.listdir("/proc/self/fd")
        writer.start()
        while writer.is_alive() and len(os.listdir("/proc/self/fd")) <= len(opened):
            pass
        return lines + b"rewritten\n"

    file.rewrite(change)
    writer.join()
    assert file.read() == b"one\nrewritten\ntwo\n"


def test_a_folder_that_is_removed_is_made_again(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(file.path.parent)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    file.append(b"two\n")
    assert file.read() == b"two\n"


def test_a_writer_that_never_ends_is_named(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "WAIT", 0.0)
    with file.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WriteError, match="another process has been writing to it for 0 s; end that one"):
            file.append(b"two\n")
        assert file.read() == b"one\n"  # readers do not wait


def test_a_disk_without_locks(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(WriteError, match="No locks available; use another folder"):
        file.append(b"two\n")


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=r"cannot write .*: (File exists|Not a directory); use another folder"):
        RecordFile(tmp_path / "file" / "lines").append(b"one\n")
    monkeypatch.setattr(os, "open", raising(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(WriteError, match="Read-only file system; use another folder"):
        RecordFile(tmp_path / "lines").append(b"one\n")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory; repair that or use another folder"):
        file.read()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="Not a directory"):
        RecordFile(tmp_path / "file" / "lines").state()
