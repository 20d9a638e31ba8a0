"""Tensors that lie in files beside the model: mapped copy on write, and never from outside the model's folder.

The four layers of ONNX's own reader (docs/ExternalDataSecurity.md there): a plain relative name, a resolved path within
the folder, opened step by step without following links, and a regular file of one name.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits

_STEP = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not wait for its writer


class ExternalData:
    """The files beside one model, each mapped once: a mapping holds a file descriptor, of which there are few."""

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self._folder = folder
        self._left = self._most = limits.max_bytes
        self._mapped: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def read(self, proto: Any, what: str, size: int) -> torch.Tensor:
        """The `size` bytes of the tensor `proto`; `what` names it in errors. Raises CaptureError."""
        if self._folder is None:
            raise CaptureError(f"{what} lies in another file; give the path of the model instead of a ModelProto")
        self._left -= size
        if self._left < 0:
            raise CaptureError(f"the tensors in other files take over {self._most} bytes; raise Limits.max_bytes")
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
            if location not in self._mapped:
                self._mapped[location] = _map(self._folder, location, what)
        except (ValueError, OSError) as error:
            raise CaptureError(f"{what} says where its data lie in a way that cannot be read: {error}") from error
        data = self._mapped[location]
        if length != size or offset < 0 or offset + size > len(data):
            raise CaptureError(
                f"{what} needs {size} bytes at {offset} of {location}, which has {len(data)}; it is damaged"
            )
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(data[offset : offset + size])


def _map(folder: Path, location: str, what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if "\0" in location:
        raise CaptureError(f"{what} lies in a file whose name has a null character; the file is damaged")
    name = PurePosixPath(location)
    outside = f"{what} lies outside the model's folder ({location[:200]}); keep its data beside the model"
    if name.is_absolute() or ".." in name.parts:
        raise CaptureError(outside)
    top, path = os.path.realpath(folder), os.path.realpath(folder / name)
    if not Path(path).is_relative_to(top):
        raise CaptureError(outside)
    if not os.path.exists(path):
        raise CaptureError(f"{what} lies in {location}, which does not exist beside the model; copy it there")
    descriptor = _open_below(top, path)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CaptureError(f"{what} lies in {location or 'a file without a name'}, which is no file")
        if found.st_nlink > 1:
            raise CaptureError(
                f"{what} lies in {location}, which has {found.st_nlink} names (hard links) and may belong elsewhere; "
                "make it a copy of its own"
            )
        if found.st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(descriptor)


def _open_below(top: str, path: str) -> int:
    """A descriptor of `path`, which no link on the way below `top` can lead elsewhere, however late it appears."""
    current = os.open(top, _STEP)
    for part in Path(path).relative_to(top).parts:
        try:
            inner = os.open(part, _STEP, dir_fd=current)
        finally:
            os.close(current)
        current = inner
    return current
