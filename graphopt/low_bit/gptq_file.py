"""Weights of GPTQ and AWQ checkpoints, which hold codes of a layer in words of 32 bits.

    LAYER.qweight  GPTQ: int32 [K b / 32, N], codes of a column one after another, the first in the lowest bits
                   AWQ:  int32 [K, N / 8], outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits on
    LAYER.qzeros   [G, N b / 32], packed along N; less 1 in the first version of GPTQ's format
    LAYER.scales   floats [G, N]
    LAYER.g_idx    GPTQ: int32 [K], the group of each input, where the file has an order of activations

Source: the formats of AutoGPTQ and GPTQModel ("gptq", "gptq_v2"), and of AutoAWQ ("gemm").
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import CaptureError, UsageError
from graphopt.low_bit.bits import unpacked
from graphopt.low_bit.tensor_file import Tensors, numbers, open_tensors
from graphopt.low_bit.weight import LowBitWeight
from graphopt.runtime.weights import Stored

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WEIGHT = ".qweight"


def read_gptq(path: str | os.PathLike[str], *, version: Literal[1, 2] = 1) -> dict[str, LowBitWeight]:
    """Every weight of a GPTQ checkpoint in one safetensors file, as "LAYER.weight".

    `version` is 2 where its quantize_config.json says "checkpoint_format": "gptq_v2". Raises CaptureError, one sentence
    that names the layer, for a file that is torn or whose tensors do not fit each other.
    """
    if version not in (1, 2):
        raise UsageError(f"version={version} of the GPTQ format does not exist; give 1 or 2")
    return _read(path, lambda layer: _gptq(layer, version))


def read_awq(path: str | os.PathLike[str]) -> dict[str, LowBitWeight]:
    """Every weight of an AWQ checkpoint ("gemm", 4 bits) in one safetensors file, as "LAYER.weight".

    Raises CaptureError as `read_gptq` does.
    """
    return _read(path, _awq)


class _Layer:
    """The tensors of one layer, each with the type and number of axes that it must have."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self.name = name
        self.tensors = tensors

    def words(self, name: str, axes: int = 2) -> np.ndarray:
        stored = self._stored(name, axes)
        if stored.dtype not in ("int32", "uint32"):
            raise CaptureError(f"{name} is {stored.dtype}, not int32")
        return stored.array()

    def scales(self) -> np.ndarray:
        return numbers(self._stored("scales", 2))

    def has(self, name: str) -> bool:
        return f"{self.name}.{name}" in self.tensors

    def _stored(self, name: str, axes: int) -> Stored:
        stored = self.tensors.get(f"{self.name}.{name}")
        if stored is None:
            raise CaptureError(f"it has no {name}")
        if len(stored.shape) != axes or not all(stored.shape):
            raise CaptureError(f"{name} has the shape {list(stored.shape)}, where {axes} axes are needed")
        return stored


def _read(path: str | os.PathLike[str], read: Callable[[_Layer], LowBitWeight]) -> dict[str, LowBitWeight]:
    tensors = open_tensors(path)
    found: dict[str, LowBitWeight] = {}
    for name in sorted(tensors):
        if not name.endswith(_WEIGHT):
            continue
        layer = _Layer(name.removesuffix(_WEIGHT), tensors)
        try:
            found[f"{layer.name}.weight"] = read(layer)
        except UsageError as error:
            raise CaptureError(f"{os.fspath(path)}: layer {layer.name}: {error}") from error
    if not found:
        raise CaptureError(f"{os.fspath(path)} holds no tensor named LAYER{_WEIGHT}; it is no such checkpoint")
    return found


def _gptq(layer: _Layer, version: int) -> LowBitWeight:
    words, zeros, scales = layer.words("qweight"), layer.words("qzeros"), layer.scales()
    groups, rows = scales.shape
    bits = zeros.shape[1] * _WORD // rows
    if bits not in (2, 3, 4, 8) or zeros.shape != (groups, rows * bits // _WORD) or rows * bits % _WORD:
        raise CaptureError(
            f"qzeros {list(zeros.shape)} do not hold codes of 2, 3, 4 or 8 bits for scales {[groups, rows]}"
        )
    columns = words.shape[0] * _WORD // bits
    if words.shape[1] != rows or words.shape[0] * _WORD % bits:
        raise CaptureError(f"qweight {list(words.shape)} does not hold {bits} bits for {rows} outputs")
    codes = unpacked(_bytes(words.T), bits, rows, columns)
    zero = unpacked(_bytes(zeros), bits, groups, rows)
    if version == 1:
        zero = (zero + 1) & ((1 << bits) - 1)
    index = _index(layer, columns, groups) if layer.has("g_idx") else None
    group = _group(columns, groups) if index is None else int((index == 0).sum())
    order = None if index is None else _order(index, group)
    if order is not None:
        codes = codes[:, order].contiguous()
    return LowBitWeight(codes, _turned(scales), bits, group, zero.t().float().contiguous(), permutation=order)


def _awq(layer: _Layer) -> LowBitWeight:
    words, zeros, scales = layer.words("qweight"), layer.words("qzeros"), layer.scales()
    groups, rows = scales.shape
    columns = words.shape[0]
    if words.shape[1] * 8 != rows or zeros.shape != (groups, rows // 8):
        raise CaptureError(
            f"qweight {list(words.shape)} and qzeros {list(zeros.shape)} do not fit scales {[groups, rows]}"
        )
    codes, zero = (_in_order(unpacked(_bytes(item), 4, len(item), rows)) for item in (words, zeros))
    return LowBitWeight(
        codes.t().contiguous(), _turned(scales), 4, _group(columns, groups), zero.t().float().contiguous()
    )


def _in_order(codes: Tensor) -> Tensor:
    """Each eight outputs in their order."""
    places = torch.tensor(_AWQ_ORDER).argsort()
    eights: Tensor = codes.unflatten(1, (-1, 8))
    return eights[:, :, places].flatten(1)


def _bytes(words: np.ndarray) -> np.ndarray:
    """uint8 [rows, 4 * words] of rows of words, the lowest byte first."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def _turned(scales: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scales.T))


def _group(columns: int, groups: int) -> int:
    if columns % groups:
        raise CaptureError(f"{groups} groups do not divide its {columns} inputs, and no g_idx says which are whose")
    return columns // groups


def _index(layer: _Layer, columns: int, groups: int) -> Tensor:
    """The group of each input."""
    index = torch.from_numpy(layer.words("g_idx", 1).astype(np.int64))
    if len(index) != columns:
        raise CaptureError(f"g_idx has {len(index)} entries for {columns} inputs")
    if int(index.min()) != 0 or int(index.max()) != groups - 1:
        raise CaptureError(f"g_idx names groups {int(index.min())} to {int(index.max())}, not 0 to {groups - 1}")
    return index


def _order(index: Tensor, group: int) -> Tensor | None:
    """The inputs in the order of their groups, or None where they are in it; the last group may be short."""
    wanted = torch.arange(len(index)) // group
    if torch.equal(index, wanted):
        return None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], wanted):
        raise CaptureError(f"g_idx does not put {group} inputs into each of its groups")
    return order
