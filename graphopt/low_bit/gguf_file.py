"""Weights of GGUF files in the blocks Q4_0, Q4_1 and Q8_0: 32 inputs of an output with a scale of 16 bits.

    Q4_0  d, 16 bytes    w = d (q - 8)     code j in the low half of byte j, code j + 16 in the high half
    Q4_1  d, m, 16 bytes w = d q + m       likewise
    Q8_0  d, 32 bytes    w = d q           q from -128 to 127

Everything that the file says of itself is checked against its length before anything is made of it. Source: the
description of GGUF 3 in ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import CaptureError
from graphopt.low_bit.tensor_file import mapped
from graphopt.low_bit.weight import LowBitWeight

BLOCK = 32
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_DEEPEST = 8  # arrays within arrays
_BYTES = {2: 18, 3: 20, 8: 34}  # of a block, by the number of its type
_LEAST_ENTRY = 8 + 4 + 4 + 8  # bytes of a tensor's entry, and more than those of a key
_MOST_AXES = 4
_SHOWN = 80  # characters of a name, in a message


def read_gguf(path: str | os.PathLike[str]) -> dict[str, LowBitWeight]:
    """Every matrix of a GGUF file in Q4_0, Q4_1 or Q8_0, by the name that it has there; other tensors are left out.

    Raises CaptureError, one sentence, for a file that is torn, no GGUF, or holds no such matrix.
    """
    name = os.fspath(path)
    data = mapped(path)
    try:
        entries, start = _entries(_Reader(data))
        wanted = [entry for entry in entries if entry.kind in _BYTES and len(entry.shape) == 2]
        _check_apart(entries, wanted)
        found = {entry.name: _weight(entry, data, start) for entry in wanted}
    except CaptureError as error:
        raise CaptureError(f"{name}: {error}") from error
    if not found:
        raise CaptureError(f"{name} holds no matrix in Q4_0, Q4_1 or Q8_0; quantize it to one of them")
    return found


@dataclass(frozen=True)
class _Entry:
    """What the file says of a tensor; the last axis of `shape` is the one that lies together."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    def __str__(self) -> str:
        return f"tensor {self.name[:_SHOWN]}"


class _Reader:
    """Takes values one after another, none beyond the end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise CaptureError(f"it ends at byte {len(self.data)} within its description; get the file again")
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def number(self, form: str) -> int:
        found: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return found

    def count(self, least: int) -> int:
        """A number of things that take `least` bytes each or more."""
        found = self.number("Q")
        if found * least > len(self.data) - self.at:
            raise CaptureError(f"it announces {found} entries where {len(self.data) - self.at} bytes are left")
        return found

    def text(self) -> str:
        return bytes(self.take(self.count(1))).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> int | None:
        """Steps over a value; whole numbers are returned."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            self.text()
        elif kind == _ARRAY and depth < _DEEPEST:
            inner = self.number("I")
            if inner in _NUMBERS:
                size = struct.calcsize(_NUMBERS[inner])
                self.take(self.count(size) * size)
            else:
                for _ in range(self.count(8)):
                    self.value(inner, depth + 1)
        else:
            raise CaptureError(f"a value has the type {kind}, which is none of GGUF {_VERSIONS[-1]}")
        return None


def _entries(reader: _Reader) -> tuple[list[_Entry], int]:
    """What is said of all tensors, and where their data start."""
    if len(reader.data) < 4 or bytes(reader.take(4)) != _MAGIC:
        raise CaptureError("it is no GGUF file")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise CaptureError(f"it is GGUF {version}, and {' and '.join(map(str, _VERSIONS))} are read")
    tensors, keys = reader.count(_LEAST_ENTRY), reader.count(8)
    alignment = 32
    for _ in range(keys):
        key = reader.text()
        value = reader.value(reader.number("I"))
        if key == _ALIGNMENT:
            alignment = value if isinstance(value, int) else 0
    if alignment < 1:
        raise CaptureError(f"{_ALIGNMENT} is no whole number of at least 1")
    entries = [_entry(reader) for _ in range(tensors)]
    return entries, reader.at + -reader.at % alignment


def _entry(reader: _Reader) -> _Entry:
    name, axes = reader.text(), reader.number("I")
    if axes > _MOST_AXES:
        raise CaptureError(f"tensor {name[:_SHOWN]} has {axes} axes, over {_MOST_AXES}")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    return _Entry(name, shape, reader.number("I"), reader.number("Q"))


def _check_apart(entries: list[_Entry], wanted: list[_Entry]) -> None:
    """Names are used once, and no two of `wanted` share bytes."""
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise CaptureError(f"two tensors have the name {entry.name[:_SHOWN]}")
        names.add(entry.name)
    in_order = sorted(wanted, key=lambda entry: entry.offset)
    for entry, following in pairwise(in_order):
        if entry.offset + _size(entry) > following.offset:
            raise CaptureError(f"{entry} and {following} share bytes")


def _size(entry: _Entry) -> int:
    """Bytes of a matrix in blocks."""
    rows, columns = entry.shape
    return rows * columns // BLOCK * _BYTES[entry.kind]


def _weight(entry: _Entry, data: memoryview, start: int) -> LowBitWeight:
    rows, columns = entry.shape
    size = _BYTES[entry.kind]
    if not rows or not columns or columns % BLOCK:
        raise CaptureError(f"{entry} is {rows} x {columns}, which is no whole number of blocks of {BLOCK}")
    count = rows * columns // BLOCK
    first = start + entry.offset
    if first + _size(entry) > len(data):
        raise CaptureError(f"{entry} ends behind byte {len(data)}, the last one; get the file again")
    blocks = np.frombuffer(data[first : first + _size(entry)], np.uint8).reshape(count, size)
    scale = _halves(blocks[:, :2])
    _check_finite(entry, scale)
    if entry.kind == 8:
        codes, zero = blocks[:, 2:] ^ 0x80, np.full(count, 128.0, np.float32)
    elif entry.kind == 2:
        codes, zero = _nibbles(blocks[:, 2:]), np.full(count, 8.0, np.float32)
    else:
        least = _halves(blocks[:, 2:4])
        _check_finite(entry, least)
        codes, scale, zero = _with_least(_nibbles(blocks[:, 4:]), scale, least)
    groups = (rows, columns // BLOCK)
    return LowBitWeight(
        torch.from_numpy(codes.reshape(rows, columns)),
        _groups(scale, groups),
        8 if entry.kind == 8 else 4,
        BLOCK,
        _groups(zero, groups),
    )


def _check_finite(entry: _Entry, value: np.ndarray) -> None:
    if not np.isfinite(value).all():
        raise CaptureError(f"{entry} has scales that are infinite or no numbers")


def _with_least(codes: np.ndarray, scale: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d q + m as d (q - z); where d is 0, all are m = 1 (0 - -m)."""
    flat = scale == 0
    codes[flat] = 0
    scale = np.where(flat, np.float32(1), scale)
    return codes, scale, -least / scale


def _nibbles(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], 1)


def _halves(data: np.ndarray) -> np.ndarray:
    """float16 in two bytes of each row, as float32."""
    return np.ascontiguousarray(data).view("<f2")[:, 0].astype(np.float32)


def _groups(value: np.ndarray, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value.reshape(shape)))
