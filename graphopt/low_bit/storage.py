"""Low-bit weights in a file of their own: safetensors with packed codes.

NAME.codes  uint8, all codes of NAME in order, `bits` each    NAME.form  int64 [rows, columns, bits, group]
NAME.scale, .zero, .codebook, .tag, .permutation              as the weight has them, left out where it has none
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphopt.artifact.safetensors import lay_out
from graphopt.errors import CaptureError, UsageError
from graphopt.low_bit.bits import packed, unpacked
from graphopt.low_bit.tensor_file import Tensors, open_tensors
from graphopt.low_bit.weight import LowBitWeight

_FORM, _CODES = "form", "codes"
_PARTS = ("scale", "zero", "codebook", "tag", "permutation")
_TYPES = {"float32", "int8", "uint8", "int64"}


def save_weights(weights: Mapping[str, LowBitWeight], path: str | os.PathLike[str]) -> None:
    """Write weights by name into a `.safetensors` file, all or nothing. Raises WriteError, UsageError for a suffix."""
    from graphopt.capture.write import write_whole

    tensors: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        form = (weight.rows, weight.columns, weight.bits, weight.group)
        tensors[f"{name}.{_FORM}"] = np.array(form, np.int64)
        tensors[f"{name}.{_CODES}"] = packed(weight.codes, weight.bits)
        for part in _PARTS:
            value = getattr(weight, part)
            if value is not None:
                tensors[f"{name}.{part}"] = value.numpy()

    def write(to: Path) -> None:
        with to.open("wb") as file:
            file.writelines(lay_out(tensors).chunks())

    write_whole(Path(path), ".safetensors", write)


def load_weights(path: str | os.PathLike[str]) -> dict[str, LowBitWeight]:
    """What `save_weights` wrote. Raises CaptureError, one sentence, for a file that is torn or none of its own."""
    tensors = open_tensors(path)
    suffix = f".{_FORM}"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    if not names:
        raise CaptureError(f"{os.fspath(path)} holds no low-bit weights; write it with save_weights")
    try:
        return {name: _weight(name, tensors) for name in sorted(names)}
    except UsageError as error:
        raise CaptureError(f"{os.fspath(path)}: {error}") from error


def _weight(name: str, tensors: Tensors) -> LowBitWeight:
    parts = {part: _tensor(f"{name}.{part}", tensors) for part in (_FORM, _CODES, *_PARTS)}
    form, codes, scale = parts.pop(_FORM), parts.pop(_CODES), parts.pop("scale")
    if form is None or form.dtype != torch.int64 or form.shape != (4,) or codes is None or scale is None:
        raise CaptureError(f"{name} has no codes, no scale or another form than rows, columns, bits and group")
    rows, columns, bits, group = form.tolist()
    if min(rows, columns) < 1 or not 1 <= bits <= 8 or codes.numel() != -(-rows * columns * bits // 8):
        raise CaptureError(f"{name} has {codes.numel()} bytes for {rows} x {columns} codes of {bits} bits")
    if codes.dtype != torch.uint8:
        raise CaptureError(f"{name}.codes are {str(codes.dtype).removeprefix('torch.')}, not uint8")
    whole = unpacked(codes.numpy().reshape(1, -1), bits, 1, rows * columns).reshape(rows, columns)
    return LowBitWeight(whole, scale, bits, group, **parts)


def _tensor(name: str, tensors: Tensors) -> Tensor | None:
    stored = tensors.get(name)
    if stored is None:
        return None
    if stored.dtype not in _TYPES:
        raise CaptureError(f"{name} is {stored.dtype}, which no part of a low-bit weight is")
    return torch.from_numpy(stored.array().copy())
