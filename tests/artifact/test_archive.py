from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.artifact import archive
from graphopt.artifact.archive import create
from graphopt.errors import ArtifactError, WriteError
from graphopt.runtime import archive as reading
from graphopt.runtime.archive import open_archive
from graphopt.runtime.manifest import Entry, Manifest, Variant

FILES = {name: {"sha256": "0" * 64, "bytes": 0} for name in ("lib/cpu.so", "weights.safetensors")}
MANIFEST = Manifest("m", {"main": Entry((), ())}, (Variant("cpu", (), "lib/cpu.so", {"main": ()}),), files=FILES)
MEMBERS = {"lib/cpu.so": b"\x7fELF" * 3000, "empty.bin": b"", "manifest.json": MANIFEST.to_json().encode()}


def write(path: Path | str) -> None:
    with create(path) as sink:
        for name, data in MEMBERS.items():
            sink.add(name, len(data), [data])


def contents(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("name", ["a.gopt", "folder/"])
def test_members_come_back(tmp_path: Path, name: str) -> None:
    write(f"{tmp_path}/{name}")
    found = open_archive(tmp_path / name)
    assert {key: bytes(found.member(key)) for key in MEMBERS} == MEMBERS
    assert contents(tmp_path) == [name.strip("/")]


def test_zipfile_agrees_and_data_start_at_pages(tmp_path: Path) -> None:
    write(tmp_path / "a.gopt")
    whole = (tmp_path / "a.gopt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.gopt") as found:
        assert found.testzip() is None
        for item in found.infolist():
            assert item.compress_type == zipfile.ZIP_STORED
            assert item.date_time == (1980, 1, 1, 0, 0, 0)
            data = MEMBERS[item.filename]
            header = whole[item.header_offset : item.header_offset + 30]
            start = item.header_offset + 30 + int.from_bytes(header[26:28], "little")
            start += int.from_bytes(header[28:30], "little")
            assert start % 4096 == 0
            assert whole[start : start + len(data)] == data


def test_two_writes_are_equal(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_large_files_use_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LIMIT", 0x2000)  # what is larger than this gets the wide fields
    write(tmp_path / "a.gopt")
    found = open_archive(tmp_path / "a.gopt")
    assert {key: bytes(found.member(key)) for key in MEMBERS} == MEMBERS
    with zipfile.ZipFile(tmp_path / "a.gopt") as read:
        assert {key: read.read(key) for key in MEMBERS} == MEMBERS
        assert any(item.header_offset > 0x2000 for item in read.infolist())


class Stop(Exception):
    pass


def broken(failure: BaseException) -> Iterator[bytes]:
    yield b"half of it"
    raise failure


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), WriteError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (Stop(), Stop),
]


@pytest.mark.parametrize("name", ["a.gopt", "folder/"])
@pytest.mark.parametrize(("failure", "expected"), FAILURES)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, name: str, failure: BaseException, expected: type[BaseException]
) -> None:
    write(f"{tmp_path}/{name}")
    with pytest.raises(expected), create(f"{tmp_path}/{name}") as sink:
        sink.add("manifest.json", 20, broken(failure))
    assert contents(tmp_path) == [name.strip("/")]
    assert {key: bytes(open_archive(tmp_path / name).member(key)) for key in MEMBERS} == MEMBERS


def test_a_failing_rename_brings_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{tmp_path}/folder/")
    rename = os.rename

    def refuse(source: str, target: str) -> None:
        if source.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        write(f"{tmp_path}/folder/")
    assert contents(tmp_path) == ["folder"]
    assert bytes(open_archive(tmp_path / "folder").member("manifest.json")) == MEMBERS["manifest.json"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from graphopt.artifact.archive import create\n"
        "from graphopt.errors import WriteError\n"
        "try:\n"
        "    with create(sys.argv[1]) as sink:\n"
        "        sink.add('lib/cpu.so', 100000, [bytes(100000)])\n"
        "except WriteError as e:\n"
        "    print(e, e.exit_code)\n"
    )
    path = tmp_path / "a.gopt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {path}: File too large 1\n"
    assert contents(tmp_path) == []


def test_a_new_folder_replaces_an_old_artifact(tmp_path: Path) -> None:
    write(f"{tmp_path}/folder/")
    (tmp_path / "folder" / "stale.so").write_bytes(b"old")
    write(f"{tmp_path}/folder/")
    assert contents(tmp_path / "folder") == ["empty.bin", "lib", "manifest.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.gopt").symlink_to(tmp_path / "real.gopt")
    write(tmp_path / "link.gopt")
    assert (tmp_path / "link.gopt").is_symlink()
    assert bytes(open_archive(tmp_path / "real.gopt").member("manifest.json")) == MEMBERS["manifest.json"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").touch()
    with pytest.raises(WriteError, match="it is a folder; give a file name, or end the path with '/'"):
        write(tmp_path / "notes")
    with pytest.raises(WriteError, match="it exists and is no artifact"):
        write(f"{tmp_path}/notes/")
    (tmp_path / "notes" / "manifest.json").write_text('{"name": "an extension of a browser"}')
    with pytest.raises(WriteError, match="it exists and is no artifact"):
        write(f"{tmp_path}/notes/")
    with pytest.raises(WriteError, match="No such file or directory"):
        write(tmp_path / "missing" / "a.gopt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="it is a device or a pipe"):
        write(tmp_path / "pipe")
    assert contents(tmp_path) == ["notes", "pipe"]


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", "a//b", ".hidden", "a\\b", "ä", "", "a/", "a\n"])
def test_member_names_that_could_escape(name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot name a member"):
        reading.check_name(name)
