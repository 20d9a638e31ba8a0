"""Codes of any number of bits in a row, the first in the lowest bits of the first byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # codes that are taken apart together: each takes a byte for every bit


def packed(codes: Tensor, bits: int) -> np.ndarray:
    """uint8 [ceil(count * bits / 8)] of all codes in order."""
    flat = codes.reshape(-1).numpy()
    parts = []
    step = _AT_ONCE // 8 * 8
    for start in range(0, len(flat), step):
        each = np.unpackbits(flat[start : start + step, None], axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(each.reshape(-1), bitorder="little"))
    return np.concatenate(parts)


def unpacked(data: np.ndarray, bits: int, rows: int, columns: int) -> Tensor:
    """uint8 [rows, columns] of the first codes in each of `rows` rows of bytes, `data` being uint8 [rows, bytes]."""
    found = np.empty((rows, columns), np.uint8)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        each = np.unpackbits(data[start : start + step], axis=1, count=columns * bits, bitorder="little")
        codes = np.packbits(each.reshape(-1, bits), axis=1, bitorder="little")
        found[start : start + step] = codes.reshape(-1, columns)
    return torch.from_numpy(found)
