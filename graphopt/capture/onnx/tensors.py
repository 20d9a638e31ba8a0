"""Tensors of an ONNX file as torch tensors; those in files beside it are mapped, not read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from graphopt.capture.onnx.external_data import ExternalData
from graphopt.errors import CaptureError

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.BFLOAT16: torch.bfloat16,
}

_FIELDS = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}  # all others: int32_data
FLOAT8: dict[int, torch.dtype] = {
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
}
"""Types that a file may hold numbers in: they are widened as the file is read."""

FOUR_BITS: dict[int, tuple[torch.dtype, tuple[int, int]]] = {
    TensorProto.UINT4: (torch.uint8, (0, 15)),
    TensorProto.INT4: (torch.int8, (-8, 7)),
}
"""The type that holds the codes once they are unpacked, and the lowest and highest of them."""


def dtype_of(code: int, what: str) -> torch.dtype:
    """The torch type of an ONNX element type; `what` has it, for the error. Raises CaptureError."""
    if code in DTYPES:
        return DTYPES[code]
    name = TensorProto.DataType.Name(code).lower() if code in TensorProto.DataType.values() else f"number {code}"
    raise CaptureError(f"{what} has the element type {name}, which graphopt does not import; use floats or integers")


def read_tensor(proto: Any, external: ExternalData) -> torch.Tensor:
    """The values of a TensorProto; external data is mapped copy on write, so the file is never changed.

    Raises CaptureError where type, size or place of the data cannot be.
    """
    what = f"tensor {proto.name!r}" if proto.name else "a tensor without a name"
    dtype, shape = FLOAT8.get(proto.data_type) or dtype_of(proto.data_type, what), tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise CaptureError(f"{what} has the shape {list(shape)}; a size must be 0 or more")
    count = math.prod(shape)
    if proto.data_location == TensorProto.EXTERNAL:
        return external.read(proto, what, count * dtype.itemsize).view(dtype).reshape(shape)
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != count * dtype.itemsize:
            raise CaptureError(f"{what} of shape {list(shape)} holds {len(proto.raw_data)} bytes; the file is damaged")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(proto.raw_data), dtype=torch.uint8).view(dtype).reshape(shape)
    held = len(getattr(proto, _FIELDS.get(proto.data_type, "int32_data")))
    if held != count:
        raise CaptureError(f"{what} of shape {list(shape)} holds {held} values; the file is damaged")
    if dtype == torch.bfloat16 or proto.data_type in FLOAT8:
        bits = np.array(proto.int32_data, dtype=f"u{dtype.itemsize}")
        return torch.from_numpy(bits).view(dtype).reshape(shape)
    return torch.from_numpy(np.array(numpy_helper.to_array(proto))).reshape(shape)


def read_four_bits(proto: Any, external: ExternalData) -> torch.Tensor:
    """The values of a TensorProto of two codes a byte, the first in the lower bits, each as a byte of its own.

    Raises CaptureError as `read_tensor` does.
    """
    dtype, _ = FOUR_BITS[proto.data_type]
    what, shape = f"tensor {proto.name!r}", tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise CaptureError(f"{what} has the shape {list(shape)}; a size must be 0 or more")
    count = math.prod(shape)
    size = (count + 1) // 2
    if proto.data_location == TensorProto.EXTERNAL:
        packed = external.read(proto, what, size)
    else:
        data = proto.raw_data if proto.HasField("raw_data") else bytes(byte & 255 for byte in proto.int32_data)
        if len(data) != size:
            raise CaptureError(f"{what} of shape {list(shape)} holds {len(data)} bytes; the file is damaged")
        packed = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)[:count]
    if dtype == torch.int8:
        codes = ((codes ^ 8).to(torch.int8) - 8).to(torch.int8)
    return codes.reshape(shape)
