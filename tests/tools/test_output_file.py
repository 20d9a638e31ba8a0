from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from graphopt.errors import UsageError, WriteError
from graphopt.tools.output_file import check_folder, check_outputs, check_suffix, replace_file


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with replace_file(tmp_path / "a") as stream:
        stream.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left on device"), WriteError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException, expected: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(expected), replace_file(tmp_path / "a") as stream:
        stream.write(b"new")
        raise error
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_folders_are_checked_before_the_work(tmp_path: Path) -> None:
    check_folder(tmp_path / "a.gopt")
    check_folder(f"{tmp_path}/")
    with pytest.raises(UsageError, match="does not exist"):
        check_folder(tmp_path / "no" / "a.gopt")
    with pytest.raises(UsageError, match="is a folder"):
        check_folder(tmp_path)


def test_suffixes() -> None:
    check_suffix("a.pt2", (".pt2", ".onnx"))
    with pytest.raises(UsageError, match=r"end its name in \.pt2 or \.onnx"):
        check_suffix("a", (".pt2", ".onnx"))


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    with replace_file(tmp_path / ("a" * 250)) as stream:
        stream.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 250]


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(WriteError, match=r"cannot write .*files cannot be made"):
        check_folder(tmp_path / "a")


def test_devices_are_not_replaced() -> None:
    with pytest.raises(UsageError, match="device"):
        check_folder("/dev/null")


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "m.pt2", "output": "m.pt2"},
        {"model": "m.pt2", "output": "link.pt2"},
        {"a": "x", "b": "m.pt2", "json": "./m.pt2"},
        {"model": "x:f", "output": "new.json", "json": "./new.json"},
        {"model": "code:f", "json": "code.py"},
        {"artifact": "folder", "json": "folder/manifest.json"},
    ],
)
def test_outputs_in_place_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("m.pt2", "code.py", "folder/manifest.json"):
        (tmp_path / name).touch()
    (tmp_path / "link.pt2").symlink_to("m.pt2")
    with pytest.raises(UsageError, match=r"would overwrite|both write"):
        check_outputs(Namespace(**arguments))


def test_outputs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_outputs(Namespace(model="m.pt2", input=None, output="new.pt2", json="new.json"))
    check_outputs(Namespace(artifact="-", json="-"))
