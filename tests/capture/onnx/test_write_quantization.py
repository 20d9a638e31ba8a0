"""quantize and dequantize as ONNX give the same codes and numbers in ONNX Runtime, and can be read again."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError
from graphopt.operators import quantization  # noqa: F401

quantize, dequantize = torch.ops.graphopt.quantize, torch.ops.graphopt.dequantize


class Quantized(nn.Module):
    """Each way of writing them once."""

    codes: Tensor
    wide: Tensor
    rows: Tensor
    zeros: Tensor
    floating: Tensor
    blocks: Tensor
    columns: Tensor
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-128, 128, (16, 24), dtype=torch.int8))
        self.register_buffer("wide", torch.randint(-9999, 9999, (16, 24), dtype=torch.int32))
        self.register_buffer("rows", torch.rand(16) / 50)
        self.register_buffer("zeros", torch.randint(-9, 9, (16,), dtype=torch.int8))
        self.register_buffer("floating", torch.rand(16))
        self.register_buffer("blocks", torch.rand(16, 3) / 50)
        self.register_buffer("columns", torch.rand(24) / 10 + 0.01)
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))

    def forward(self, x: Tensor, step: Tensor) -> dict[str, Tensor]:
        byte = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}
        code = {"qmin": -128, "qmax": 127, "dtype": torch.float32}
        double = {**code, "dtype": torch.float64}
        number = dequantize(quantize(x, step, self.zero, **byte), step, self.zero, **code)
        return {
            "unsigned": quantize(x, step, self.zero, **byte),
            "clipped": quantize(number @ self.codes.t().float(), step, None, qmin=-100, qmax=99, dtype=torch.int8),
            "along": quantize(x, self.columns, None, axis=1, **byte),
            "sixteen": quantize(x, step / 999, None, qmin=-(2**15), qmax=2**15 - 1, dtype=torch.int16),
            "codes_in_blocks": quantize(number.mean() * self.codes, self.blocks, None, axis=1, block=9, **byte),
            "numbers_in_blocks": dequantize(self.codes, self.blocks, None, axis=1, block=8, **code) * step,
            "of_rows": dequantize(self.codes, self.rows * step, self.zeros, axis=0, **code),
            "of_double": dequantize(self.codes, self.rows * step, self.zeros, axis=0, **double),
            "of_floating_zeros": dequantize(self.codes, self.rows * step, self.floating, axis=0, **code),
            "of_32_bits": dequantize(self.wide, self.rows * step, None, axis=0, **code),
            "of_half_steps": dequantize(self.codes, (self.rows * step).half(), self.zeros, axis=0, **code),
        }


@pytest.mark.slow
def test_every_form(tmp_path: Path) -> None:
    inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * 20, torch.tensor(0.0987)
    torch.manual_seed(0)
    program = graphopt.capture(Quantized(), inputs, dynamic_shapes={"x": {0: "n"}})
    path = str(tmp_path / "m.onnx")
    program.to_onnx(path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 5
    session, again = onnxruntime.InferenceSession(path), graphopt.capture(path)
    for rows in (5, 2):
        x, step = inputs[0][:rows], inputs[1]
        wanted = program(x, step)
        theirs = session.run(None, {"x": x.numpy(), "step": step.numpy()})
        for spec, want, found, read in zip(program.outputs, wanted, theirs, again(x, step), strict=True):
            for result in (torch.from_numpy(found), read):
                assert result.dtype == want.dtype, spec.name
                torch.testing.assert_close(result, want, rtol=1e-6, atol=1e-6)


class Reciprocal(nn.Module):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        result: Tensor = quantize(x, step, None, qmin=0, qmax=255, dtype=torch.uint8, reciprocal=True)
        return result


def test_what_onnx_cannot_say_is_refused(tmp_path: Path) -> None:
    program = graphopt.capture(Reciprocal(), (torch.ones(3), torch.tensor(0.1)))
    with pytest.raises(UsageError, match="reciprocal"):
        program.to_onnx(str(tmp_path / "m.onnx"))
