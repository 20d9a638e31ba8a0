"""The dtypes an artifact may hold, and how the manifest, numpy, safetensors and ONNX Runtime spell each.

numpy has no bfloat16 of its own, so its bits travel as uint16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from graphopt.errors import ArtifactError


class Spelling(NamedTuple):
    """`carrier` is the numpy dtype that holds the bits; `onnx` is the element type as ONNX Runtime prints it."""

    safetensors: str
    onnx: str
    carrier: np.dtype[np.generic]


def _spelling(safetensors: str, onnx: str, carrier: str) -> Spelling:
    return Spelling(safetensors, onnx, np.dtype(carrier))


DTYPES = {
    "float64": _spelling("F64", "double", "<f8"),
    "float32": _spelling("F32", "float", "<f4"),
    "float16": _spelling("F16", "float16", "<f2"),
    "bfloat16": _spelling("BF16", "bfloat16", "<u2"),
    "float8_e4m3fn": _spelling("F8_E4M3", "float8e4m3fn", "u1"),
    "float8_e5m2": _spelling("F8_E5M2", "float8e5m2", "u1"),
    "int64": _spelling("I64", "int64", "<i8"),
    "int32": _spelling("I32", "int32", "<i4"),
    "int16": _spelling("I16", "int16", "<i2"),
    "int8": _spelling("I8", "int8", "i1"),
    "uint64": _spelling("U64", "uint64", "<u8"),
    "uint32": _spelling("U32", "uint32", "<u4"),
    "uint16": _spelling("U16", "uint16", "<u2"),
    "uint8": _spelling("U8", "uint8", "u1"),
    "bool": _spelling("BOOL", "bool", "?"),
}
FROM_SAFETENSORS = {spelling.safetensors: name for name, spelling in DTYPES.items()}
CARRIED = frozenset(name for name, spelling in DTYPES.items() if spelling.carrier.name != name)  # unknown to numpy


def name_of(dtype: np.dtype[np.generic]) -> str:
    """The manifest's name of a numpy dtype, byte order aside; bfloat16 and float8 are those of `ml_dtypes`."""
    if dtype.name in DTYPES:
        return dtype.name
    raise ArtifactError(f"an artifact cannot hold dtype {dtype}; it holds {', '.join(DTYPES)}")
