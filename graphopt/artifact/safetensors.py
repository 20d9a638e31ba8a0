"""A safetensors writer that puts every tensor at a multiple of 64 bytes and never holds the file in memory.

The format wants data without holes, so each gap is an uint8 tensor of its own, `__pad.N`. A tensor that is the very
memory of another one is stored once; the file's metadata maps `alias.<name>` to the stored name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from graphopt.errors import ArtifactError
from graphopt.runtime.dtypes import DTYPES, name_of
from graphopt.runtime.weights import ALIAS, ALIGNMENT, METADATA, PAD


@dataclass
class TensorFile:
    """A laid-out file: `chunks()` yields its bytes, after which `sha256` holds the hash of every tensor by name."""

    size: int
    sha256: dict[str, str] = field(default_factory=dict)
    _head: bytes = b""
    _stored: dict[str, np.ndarray] = field(default_factory=dict)
    _aliases: dict[str, str] = field(default_factory=dict)

    @property
    def header_sha256(self) -> str:
        """Of everything before the tensors: names, dtypes, shapes and places."""
        return hashlib.sha256(self._head).hexdigest()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's bytes in order; a tensor is copied only if it is strided or big-endian, and only while written."""
        yield self._head
        for name, array in self._stored.items():
            data = _bytes(array)
            self.sha256[name] = hashlib.sha256(data).hexdigest()
            yield data
            yield bytes(-data.nbytes % ALIGNMENT)
        for name, stored in self._aliases.items():
            self.sha256[name] = self.sha256[stored]


def lay_out(tensors: Mapping[str, np.ndarray]) -> TensorFile:
    """Decide where each tensor goes; sorted by name, so the order of `tensors` leaves the bytes as they are."""
    stored, aliases = _unique(tensors)
    header: dict[str, object] = {}
    position = 0
    for name, array in stored.items():
        spelling = DTYPES[name_of(array.dtype)]
        end = position + array.nbytes
        header[name] = {"dtype": spelling.safetensors, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end + -end % ALIGNMENT
        if position != end:
            pad = {"dtype": "U8", "shape": [position - end], "data_offsets": [end, position]}
            header[f"{PAD}{len(header)}"] = pad
    if aliases:
        header[METADATA] = {f"{ALIAS}{name}": target for name, target in aliases.items()}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return TensorFile(len(head) + position, _head=head, _stored=stored, _aliases=aliases)


def _unique(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    stored: dict[str, np.ndarray] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name in sorted(tensors):
        array = tensors[name]
        if name.startswith(PAD) or name == METADATA:
            raise ArtifactError(f"a tensor cannot be named {name!r}, the file format uses that name; rename it")
        memory = (array.__array_interface__["data"][0], array.dtype, array.shape, array.strides)
        if array.size and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            stored[name] = array
    return stored, aliases


def _bytes(array: np.ndarray) -> memoryview:
    native = array.dtype.newbyteorder("<")
    flat = np.ascontiguousarray(array, dtype=native).reshape(-1)
    return flat.view(np.uint8).data
