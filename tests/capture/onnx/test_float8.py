"""8-bit floats are a way to hold weights: widened as the file is read, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphopt.capture import capture
from graphopt.errors import CaptureError

KINDS = {"e4m3fn": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}


def model_of(kind: str, nodes: list[Any], raw: bool) -> tuple[ModelProto, torch.Tensor]:
    """A file whose weight [8, 16] holds every pattern of 8 bits but those of NaN and infinities; y reads x [2, 8]."""
    bits = torch.arange(128, dtype=torch.uint8).reshape(8, 16)
    held = bits.view(getattr(torch, f"float8_{kind}"))
    held = torch.where(torch.isfinite(held.float()), held.float(), torch.zeros(())).to(held.dtype)
    values = held.view(torch.uint8)
    weight = TensorProto(name="w", data_type=KINDS[kind], dims=[8, 16])
    if raw:
        weight.raw_data = values.numpy().tobytes()
    else:
        weight.int32_data.extend(values.flatten().tolist())
    scale = numpy_helper.from_array(np.linspace(0.5, 2, 16, dtype=np.float32), "scale")
    graph = helper.make_graph(
        nodes,
        "float8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), held.float()


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_widened_exactly(kind: str, raw: bool) -> None:
    cast = helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT)
    model, held = model_of(kind, [cast, helper.make_node("MatMul", ["x", "wide"], ["y"])], raw)
    x = torch.randn(2, 8)
    program = capture(model)
    torch.testing.assert_close(program(x)[0], x @ held)
    assert {tensor.dtype for tensor in program.graph_module.state_dict().values()} == {torch.float32}


def test_weights_are_dequantized() -> None:
    dequantize = helper.make_node("DequantizeLinear", ["w", "scale"], ["wide"], axis=1)
    model, held = model_of("e4m3fn", [dequantize, helper.make_node("MatMul", ["x", "wide"], ["y"])], True)
    x = torch.randn(2, 8)
    torch.testing.assert_close(capture(model)(x)[0], x @ (held * torch.linspace(0.5, 2, 16)))


def test_arithmetic_with_it_is_refused() -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(CaptureError, match="MatMul of float8_e5m2 is not imported; cast or dequantize"):
        capture(model_of("e5m2", [product], True)[0])
