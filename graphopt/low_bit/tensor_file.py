"""Reading safetensors files that others wrote: mapped, checked against their size, tensors left where they are."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from graphopt.errors import ArtifactError, CaptureError
from graphopt.runtime.weights import Stored, read_tensors

Tensors = Mapping[str, Stored]


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file by name. Raises CaptureError for what is none, or is torn."""
    data = mapped(path)
    try:
        return read_tensors(os.fspath(path), data)
    except ArtifactError as error:
        raise CaptureError(f"{os.fspath(path)} is no safetensors file, or is damaged ({error.__cause__})") from error


def mapped(path: str | os.PathLike[str]) -> memoryview:
    """The bytes of a file; the map lives as long as what reads from it."""
    try:
        with Path(path).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise CaptureError(f"{os.fspath(path)} is empty; get the file again")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CaptureError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from error


def numbers(stored: Stored) -> np.ndarray:
    """A tensor of floats as float32."""
    if stored.dtype == "bfloat16":
        return (stored.array().astype(np.uint32) << 16).view(np.float32)
    if stored.dtype not in ("float16", "float32", "float64"):
        raise CaptureError(f"scales are floats of 16, 32 or 64 bits, not {stored.dtype}")
    found: np.ndarray = stored.array().astype(np.float32)
    return found
