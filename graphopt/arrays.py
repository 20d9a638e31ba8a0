"""Tensors as numpy arrays and back; numpy has no bfloat16 and float8 of its own, ml_dtypes adds them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

_ADDED: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz),
    torch.float8_e8m0fnu: (torch.uint8, ml_dtypes.float8_e8m0fnu),
}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as an array."""
    tensor = tensor.detach()
    if tensor.dtype not in _ADDED:
        return tensor.numpy()
    carrier, dtype = _ADDED[tensor.dtype]
    return tensor.view(carrier).numpy().view(dtype)


def result_of(tensor: torch.Tensor) -> np.ndarray:
    """The array that a session returns for this tensor: bfloat16 as float32."""
    return array_of(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What a session takes or returns for a value of this dtype: bits, numbers of ml_dtypes, or float32."""
    if dtype not in _ADDED:
        return torch.from_numpy(array)
    carrier, added = _ADDED[dtype]
    if array.dtype == added or array.dtype == np.dtype(str(carrier).removeprefix("torch.")):
        return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(dtype)
    return torch.from_numpy(array).to(dtype)
