"""Element types of two and four bits, which torch has no arithmetic for: their numbers are held in a wider type.

An input or output of such a type is one of the wider type in the program: int8, uint8, or float8_e4m3fn for float4e2m1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import TensorProto

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of float4e2m1 by their codes; those of 8 to 15 are negative."""


@dataclass(frozen=True)
class Narrow:
    """A type: the code that ONNX has for it, what holds its numbers, and the lowest and highest of them."""

    code: int
    carrier: torch.dtype
    bits: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return str(TensorProto.DataType.Name(self.code)).lower()

    @property
    def is_float(self) -> bool:
        return self.carrier.is_floating_point


NARROW: dict[int, Narrow] = {
    kind.code: kind
    for kind in (
        Narrow(TensorProto.UINT4, torch.uint8, 4, 0, 15),
        Narrow(TensorProto.INT4, torch.int8, 4, -8, 7),
        Narrow(TensorProto.UINT2, torch.uint8, 2, 0, 3),
        Narrow(TensorProto.INT2, torch.int8, 2, -2, 1),
        Narrow(TensorProto.FLOAT4E2M1, torch.float8_e4m3fn, 4, -6, 6),
    )
}


def unpacked(data: torch.Tensor, count: int, kind: Narrow) -> torch.Tensor:
    """`count` numbers from bytes that hold several each, the first in the lowest bits."""
    places = torch.arange(0, 8, kind.bits, dtype=torch.uint8)
    codes = ((data.reshape(-1, 1) >> places) & (2**kind.bits - 1)).reshape(-1)[:count]
    if kind.is_float:
        numbers = torch.tensor([*FLOAT4, *(-number for number in FLOAT4)])
        return numbers[codes.long()].to(kind.carrier)
    return codes if kind.low == 0 else wrapped(codes.to(torch.int8), kind)


def wrapped(codes: torch.Tensor, kind: Narrow) -> torch.Tensor:
    """Bits of a signed number as that number."""
    sign = -kind.low
    return ((codes ^ sign) - sign).to(kind.carrier)
