"""Attributes of one ONNX node; one that nobody reads is an error, so nothing is silently left out."""

from __future__ import annotations

from typing import Any

import torch
from onnx import AttributeProto

from graphopt.capture.onnx.external_data import ExternalData
from graphopt.capture.onnx.narrow import NARROW, Narrow
from graphopt.capture.onnx.tensors import read_tensor
from graphopt.capture.onnx.values import rounded
from graphopt.errors import CaptureError

_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}


class Attributes:
    def __init__(self, node: Any, external: ExternalData) -> None:
        self._entries = {entry.name: entry for entry in node.attribute}
        self._external = external
        self._read: set[str] = set()

    def unread(self) -> list[str]:
        return sorted(self._entries.keys() - self._read)

    def names(self) -> list[str]:
        return list(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def ignore(self, *names: str) -> None:
        """Attributes that say nothing new, or hints that change no result."""
        self._read.update(names)

    def _value(self, name: str, kind: AttributeProto.AttributeType) -> Any:
        self._read.add(name)
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.type != kind:
            raise CaptureError(f"attribute {name!r} is not of type {AttributeProto.AttributeType.Name(kind)}")
        return getattr(entry, _FIELDS[kind])

    def integer(self, name: str, default: int = 0) -> int:
        value = self._value(name, AttributeProto.INT)
        return default if value is None else int(value)

    def number(self, name: str, default: float) -> float:
        value = self._value(name, AttributeProto.FLOAT)
        return default if value is None else float(rounded(float(value), torch.float32))

    def text(self, name: str, default: str) -> str:
        value = self._value(name, AttributeProto.STRING)
        return default if value is None else value.decode(errors="replace")

    def integers(self, name: str) -> list[int] | None:
        value = self._value(name, AttributeProto.INTS)
        return None if value is None else [int(item) for item in value]

    def numbers(self, name: str) -> list[float] | None:
        value = self._value(name, AttributeProto.FLOATS)
        return None if value is None else [float(rounded(float(item), torch.float32)) for item in value]

    def texts(self, name: str) -> list[str] | None:
        value = self._value(name, AttributeProto.STRINGS)
        return None if value is None else [item.decode(errors="replace") for item in value]

    def tensor(self, name: str) -> torch.Tensor | None:
        value = self._value(name, AttributeProto.TENSOR)
        return None if value is None else read_tensor(value, self._external)

    def narrow(self, name: str) -> Narrow | None:
        """The type of a tensor in the file where torch has none of its bits."""
        value = self._value(name, AttributeProto.TENSOR)
        return None if value is None else NARROW.get(value.data_type)

    def graph(self, name: str) -> Any:
        return self._value(name, AttributeProto.GRAPH)
