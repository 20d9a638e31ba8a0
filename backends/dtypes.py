"""torch dtypes as TVM spells them."""

from __future__ import annotations

import torch

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.uint16: "uint16",  # torch has no arithmetic for the wide unsigned types: they are cast, moved and compared
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.bool: "bool",
}
