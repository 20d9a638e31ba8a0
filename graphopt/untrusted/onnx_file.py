"""Walks a `.onnx` before protobuf parses it: how deep, how many messages, how much memory its numbers take.

Protobuf reads whatever is well formed, and a few bytes may stand for much: two for a node, one for a number of eight.
Tensors of raw data are stepped over, so the file is mapped and mostly not read. Field numbers are those of `onnx.proto`
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); what the tensors mean is checked where they are used.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits

MOST_BYTES = (1 << 31) - 1  # of a protobuf message
MOST_DEPTH = 100  # of messages within messages; protobuf reads no more
FIELDS_A_NODE = 100  # real files have some 60, what is said of types and modules included

_VARINT, _BYTES = 0, 2
_WIDTHS = {1: 8, 5: 4}
_CHUNK = 1 << 22
_LAST = bytes(range(128, 256))  # all but the last byte of a number have the high bit

_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 8: "Leaf", 14: "Leaf", 20: "Training", 25: "Function", 26: "Leaf"},
    "Graph": {
        1: "Node", 5: "Tensor", 11: "Value", 12: "Value", 13: "Value", 14: "Annotation", 15: "Sparse", 16: "Leaf",
    },
    "Function": {7: "Node", 9: "Leaf", 11: "Attribute", 12: "Value", 14: "Leaf"},
    "Training": {1: "Graph", 2: "Graph", 3: "Leaf", 4: "Leaf"},
    "Annotation": {2: "Leaf"},
    "Node": {5: "Attribute", 9: "Leaf", 10: "Devices"},
    "Devices": {2: "Sharding"},
    "Sharding": {3: "Leaf", 4: "Sharded"},
    "Sharded": {2: "Leaf"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 14: "Type", 15: "Type", 22: "Sparse", 23: "Sparse",
    },
    "Tensor": {3: "Leaf", 13: "Leaf", 16: "Leaf"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Value": {2: "Type", 4: "Leaf"},
    "Type": {1: "Elements", 4: "Element", 5: "Pairs", 7: "Leaf", 8: "Elements", 9: "Element"},
    "Elements": {2: "Shape"},
    "Element": {1: "Type"},
    "Pairs": {2: "Type"},
    "Shape": {1: "Leaf"},
    "Leaf": {},
}  # fmt: skip
"""The fields of each message that hold messages; a Leaf holds numbers and texts only."""

_NUMBERS = {("Tensor", 1): 8, ("Tensor", 5): 4, ("Tensor", 7): 8, ("Tensor", 11): 8, ("Attribute", 8): 8}
"""Lists of numbers of one to ten bytes in the file, and the bytes of each in memory."""


@dataclass
class _Walk:
    data: mmap.mmap
    limits: Limits
    nodes: int = 0
    fields: int = 0
    grown: int = 0  # bytes that lists of numbers take beyond those in the file


def check_file(path: Path, folder: Path, limits: Limits) -> None:
    """Raise CaptureError where the file is damaged, or would take more than `limits` allow; OSError as reading does."""
    size = os.stat(path).st_size
    if size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _message(_Walk(data, limits), "Model", 0, size, 0)
        except IndexError as error:
            raise CaptureError(f"{path} is no ONNX model, or is damaged") from error
        except CaptureError as error:
            raise CaptureError(f"{path}: {error}") from error


def _message(walk: _Walk, kind: str, at: int, end: int, depth: int) -> None:
    """IndexError: the bytes from `at` to `end` are no message."""
    if depth == MOST_DEPTH:
        raise CaptureError(
            f"its graphs lie within one another deeper than protobuf reads ({MOST_DEPTH} messages); "
            "write branches within branches as one"
        )
    data, inner = walk.data, _MESSAGES[kind]
    while at < end:
        tag, at = _number(data, at, end)
        _count_field(walk)
        wire, field = tag & 7, tag >> 3
        if wire != _BYTES:
            at = _after_number(data, wire, at, end)
            continue
        size, at = _number(data, at, end)
        if field == 0 or at + size > end:
            raise IndexError
        if field in inner:
            if inner[field] == "Node":
                _count_node(walk)
            _message(walk, inner[field], at, at + size, depth + 1)
        elif (kind, field) in _NUMBERS:
            _count_numbers(walk, at, at + size, _NUMBERS[kind, field])
        at += size
    if at > end:
        raise IndexError


def _after_number(data: mmap.mmap, wire: int, at: int, end: int) -> int:
    if wire == _VARINT:
        return _number(data, at, end)[1]
    if wire in _WIDTHS:
        return at + _WIDTHS[wire]
    raise IndexError


def _number(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits in each, and the place after it."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    for place in range(at + 1, min(at + 10, end)):
        byte = data[place]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + 1
        shift += 7
    raise IndexError


def _count_field(walk: _Walk) -> None:
    walk.fields += 1
    if walk.fields > FIELDS_A_NODE * walk.limits.max_nodes:
        raise CaptureError(
            f"it has over {walk.fields - 1} fields, {FIELDS_A_NODE} for each node that a model may have; "
            "raise Limits.max_nodes"
        )


def _count_node(walk: _Walk) -> None:
    walk.nodes += 1
    if walk.nodes > walk.limits.max_nodes:
        raise CaptureError(f"it has over {walk.limits.max_nodes} nodes; raise Limits.max_nodes")


def _count_numbers(walk: _Walk, at: int, end: int, width: int) -> None:
    for place in range(at, end, _CHUNK):
        chunk = walk.data[place : min(place + _CHUNK, end)]
        walk.grown += width * len(chunk.translate(None, _LAST)) - len(chunk)
    if walk.grown > walk.limits.max_constant_bytes:
        raise CaptureError(
            f"its numbers take over {walk.limits.max_constant_bytes} bytes more in memory than in the file; "
            "raise Limits.max_constant_bytes"
        )
