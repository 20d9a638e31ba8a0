from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.tools.output_file import check_folder, check_suffix, replace_file


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with replace_file(tmp_path / "a") as stream:
        stream.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)), replace_file(tmp_path / "a") as stream:
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
