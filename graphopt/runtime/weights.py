"""Reading a safetensors member: names, dtypes and shapes checked, tensors left where they are mapped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError
from graphopt.runtime.dtypes import DTYPES, FROM_SAFETENSORS

ALIGNMENT = 64
PAD, METADATA, ALIAS = "__pad.", "__metadata__", "alias."


def state_name(name: str) -> str:
    """The weights member's name of the tensor a state starts from."""
    return f"state.{name}"


@dataclass(frozen=True)
class Stored:
    """A tensor inside a member; `data` are its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> np.ndarray:
        """A read-only view; bfloat16 and float8 as unsigned integers of the same bits."""
        return np.frombuffer(self.data, DTYPES[self.dtype].carrier).reshape(self.shape)

    def sha256(self) -> str:
        """Of the tensor's bytes."""
        return hashlib.sha256(self.data).hexdigest()


def header_sha256(data: memoryview) -> str:
    """Of everything before the tensors."""
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def read_tensors(member: str, data: memoryview) -> dict[str, Stored]:
    """Every tensor of a safetensors member, aliases included, padding left out; only the header is read."""
    try:
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= len(data) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(bytes(data[8 : 8 + length]))
        body = data[8 + length :]
        found = {name: _stored(name, item, body) for name, item in header.items() if not _is_internal(name)}
        for key, target in header.get(METADATA, {}).items():
            if key.startswith(ALIAS):
                found[key.removeprefix(ALIAS)] = found[target]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"member {member} is damaged ({e}); get the artifact again or compile it again") from e
    return found


def _is_internal(name: str) -> bool:
    return name == METADATA or name.startswith(PAD)


def _stored(name: str, item: Mapping[str, Any], body: memoryview) -> Stored:
    dtype, shape = FROM_SAFETENSORS[item["dtype"]], tuple(item["shape"])
    begin, end = item["data_offsets"]
    if not all(isinstance(value, int) and value >= 0 for value in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a size that is no whole number")
    if end > len(body) or end - begin != math.prod(shape) * DTYPES[dtype].carrier.itemsize:
        raise ValueError(f"tensor {name} lies outside the file or has another size than its shape")
    return Stored(dtype, shape, body[begin:end])
