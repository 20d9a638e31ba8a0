"""Compiled quantize and dequantize give PyTorch's codes and numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.operators import quantization  # noqa: F401

Check = Callable[..., None]
quantize, dequantize = torch.ops.graphopt.quantize, torch.ops.graphopt.dequantize


class Quantized(nn.Module):
    """Every form once: per tensor, along each axis, in blocks; constant and computed parameters."""

    codes: Tensor
    wide: Tensor
    step: Tensor
    zero: Tensor
    rows: Tensor
    row_zeros: Tensor
    columns: Tensor
    blocks: Tensor
    floating_zeros: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) / 20 + 0.01

        def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).to(dtype)

        self.register_buffer("codes", integers(-128, 128, torch.int8, 16, 24))
        self.register_buffer("wide", integers(-(2**31), 2**31 - 1, torch.int32, 16))
        self.register_buffer("step", torch.tensor(0.1))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))
        self.register_buffer("rows", rand(16))
        self.register_buffer("row_zeros", integers(-9, 9, torch.int8, 16))
        self.register_buffer("columns", rand(24))
        self.register_buffer("blocks", rand(16, 3))
        self.register_buffer("floating_zeros", rand(16, 3))

    def forward(self, x: Tensor, codes: Tensor) -> dict[str, Tensor]:
        signed = {"qmin": -128, "qmax": 127}
        byte, code = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}, {**signed, "dtype": torch.int8}
        number, half = {**signed, "dtype": torch.float32}, {**signed, "dtype": torch.float16}
        a = quantize(x, self.step, self.zero, **byte)
        weight = dequantize(self.codes, self.rows, self.row_zeros, axis=0, **number)
        bias = dequantize(self.wide, self.rows / 1e9, None, axis=0, **number)
        layer = torch.relu(F.linear(dequantize(a, self.step, self.zero, **number), weight, bias))
        size = x[0, :1].nan_to_num(1.0, 1.0, 1.0).squeeze()
        return {
            "codes": a,
            "layer": quantize(layer, self.step, None, qmin=-100, qmax=100, dtype=torch.int8),
            "columns": quantize(x, self.columns, None, axis=1, qmin=0, qmax=15, dtype=torch.uint8),
            "reciprocal": quantize(x, self.columns, None, axis=1, **code, reciprocal=True),
            "sixteen": quantize(x, self.step / 1000, None, qmin=-(2**15), qmax=2**15 - 1, dtype=torch.int16),
            "double": quantize(x.double(), self.step, self.zero, **byte),
            "rows": dequantize(codes, self.rows * size, self.row_zeros, axis=0, **number),
            "half": dequantize(codes, self.rows.half(), self.row_zeros, axis=0, **half),
            "blocks": dequantize(codes, self.blocks * size, None, axis=1, block=8, **number),
            "odd_blocks": quantize(codes.float(), self.blocks, None, axis=1, block=9, **code),
            "floating_zeros": dequantize(codes, self.blocks, self.floating_zeros, axis=1, block=8, **number),
        }


def test_every_form(agree: Check) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)) * 20
    x[0, :7] = torch.tensor([0.25, 0.05, 0.15, float("nan"), float("inf"), -float("inf"), 1e30])
    codes = torch.randint(-128, 128, (16, 24), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    more = [(x[:1], codes), (x[1:4], codes)]
    agree(Quantized(), [x, codes], [{0: "n"}, None], more, rtol=0, atol=0)
