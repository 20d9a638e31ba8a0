"""Tensors of an ONNX file as torch tensors; those in files beside it are mapped, not read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from graphopt.capture.onnx.external_data import ExternalData
from graphopt.capture.onnx.narrow import NARROW, unpacked
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
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
}
"""Types without arithmetic: what a file holds of them is widened where it is read."""

DTYPES |= FLOAT8


def dtype_of(code: int, what: str) -> torch.dtype:
    """The torch type that holds an ONNX element type; `what` has it, for the error. Raises CaptureError."""
    if code in DTYPES:
        return DTYPES[code]
    if code in NARROW:
        return NARROW[code].carrier
    name = TensorProto.DataType.Name(code).lower() if code in TensorProto.DataType.values() else f"number {code}"
    raise CaptureError(f"{what} has the element type {name}, which graphopt does not import; use floats or integers")


def read_tensor(proto: Any, external: ExternalData) -> torch.Tensor:
    """The values of a TensorProto; external data is mapped copy on write, so the file is never changed.

    Raises CaptureError where type, size or place of the data cannot be.
    """
    what = f"tensor {proto.name!r}" if proto.name else "a tensor without a name"
    if proto.data_type in NARROW:
        return read_narrow(proto, external)
    dtype, shape = dtype_of(proto.data_type, what), tuple(proto.dims)
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


def read_narrow(proto: Any, external: ExternalData) -> torch.Tensor:
    """The values of a TensorProto of two or four bits each, in the type that holds them.

    Raises CaptureError as `read_tensor` does.
    """
    kind = NARROW[proto.data_type]
    what, shape = f"tensor {proto.name!r}" if proto.name else "a tensor without a name", tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise CaptureError(f"{what} has the shape {list(shape)}; a size must be 0 or more")
    count = math.prod(shape)
    size = (count * kind.bits + 7) // 8
    if proto.data_location == TensorProto.EXTERNAL:
        packed = external.read(proto, what, size)
    else:
        data = proto.raw_data if proto.HasField("raw_data") else bytes(byte & 255 for byte in proto.int32_data)
        if len(data) != size:
            raise CaptureError(f"{what} of shape {list(shape)} holds {len(data)} bytes; the file is damaged")
        packed = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)) if size else torch.empty(0).byte()
    return unpacked(packed, count, kind).reshape(shape)
