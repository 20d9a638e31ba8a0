"""Composites that torch modules write out are one node, as they are from ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from graphopt.capture import capture
from tests.capture.onnx.tiny import model_of, worst_error


class RmsNorm(nn.Module):
    """`shift` beside the weight is Gemma's way."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * (self.weight + self.shift) if self.shift else self.weight * y


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def tanh_gelu_by_products(x: Tensor) -> Tensor:
    return 0.5 * (x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * (x * x))))))


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def other_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (RmsNorm(), ["aten.rms_norm.default"]),
        (RmsNorm(1.0), ["aten.add.Tensor", "aten.rms_norm.default"]),
        (Calls(tanh_gelu), ["aten.gelu.default"]),
        (Calls(tanh_gelu_by_products), ["aten.gelu.default"]),
        (Calls(erf_gelu), ["aten.gelu.default"]),
    ],
    ids=["rms-norm", "shifted-rms-norm", "tanh-gelu", "tanh-gelu-by-products", "erf-gelu"],
)
def test_one_node(module: nn.Module, wanted: list[str]) -> None:
    x = torch.randn(3, 8)
    program = capture(module, (x,), dynamic_shapes={"x": {0: "rows"}})
    assert [str(node.target) for node in program.nodes() if node.op == "call_function"] == wanted
    torch.testing.assert_close(program(x)[0], module(x))


def test_other_numbers_stay() -> None:
    program = capture(Calls(other_gelu), (torch.randn(3, 8),))
    assert "aten.gelu.default" not in {str(node.target) for node in program.nodes()}


def attention_file(*, scaled_after: bool) -> onnx.ModelProto:
    """softmax(q k + bias + mask) v, or with the sum doubled."""
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["biased"]),
        helper.make_node("Add", ["mask", "biased"], ["masked"]),
        helper.make_node("Mul", ["masked", "two"], ["doubled"]),
        helper.make_node("Softmax", ["doubled" if scaled_after else "masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["r"]),
    ]
    shapes = {"q": ["n", 2, "s", 4], "k": ["n", 2, 4, "s"], "v": ["n", 2, "s", 4], "mask": ["n", 1, 1, "s"]}
    inputs = {name: ("float32", shape) for name, shape in {**shapes, "bias": [1, 2, "s", "s"]}.items()}
    return model_of(nodes, inputs, ["r"], {"two": np.array(2, np.float32)})


def test_attention_with_a_bias_and_a_mask() -> None:
    for scaled_after in (False, True):
        model = attention_file(scaled_after=scaled_after)
        program = capture(model)
        found = "aten.scaled_dot_product_attention.default" in {str(node.target) for node in program.nodes()}
        assert found is not scaled_after and worst_error(program, model) < 1e-5
