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
}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as an array."""
    tensor = tensor.detach()
    if tensor.dtype not in _ADDED:
        return tensor.numpy()
    carrier, dtype = _ADDED[tensor.dtype]
    return tensor.view(carrier).numpy().view(dtype)


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What a session returned for a value of this dtype: bfloat16 comes as float32, float8 as its bits."""
    tensor = torch.from_numpy(array)
    if dtype is torch.bfloat16 and tensor.dtype is torch.float32:
        return tensor.to(dtype)
    return tensor.view(dtype) if dtype in _ADDED else tensor
