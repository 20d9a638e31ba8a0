"""Named arrays in .npz files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from graphopt.errors import UsageError
from graphopt.tools.output_file import replace_file

Array = np.ndarray[Any, Any]


def read_arrays(path: str) -> dict[str, Array]:
    """Raises UsageError when `path` is not an .npz of plain arrays; nothing in it is ever unpickled."""
    try:
        with open(path, "rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise UsageError(f"{path} holds one array without a name; write it with numpy.savez(path, name=array)")
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UsageError(f"{path} is not an .npz of plain arrays; write one with numpy.savez(path, name=array)") from e


def write_arrays(path: str, arrays: Mapping[str, Array]) -> None:
    """Appears whole or not at all."""
    with replace_file(path) as stream:
        save_arrays(stream, arrays)


def save_arrays(stream: IO[bytes], arrays: Mapping[str, Array]) -> None:
    """What numpy.savez does, which cannot take arrays named "file" or "allow_pickle"."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
