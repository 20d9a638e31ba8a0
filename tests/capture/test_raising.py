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


class Product(nn.Module):
    """x Wt + b spelled by the transpose, its rows put into one axis where asked."""

    def __init__(
        self, *, rows: bool = False, bias: bool = True, turn: Callable[[Tensor], Tensor] = lambda weight: weight.T
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))
        self.bias = nn.Parameter(torch.rand(8)) if bias else None
        self.rows = rows
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        y = (x.view(-1, 8) if self.rows else x) @ self.turn(self.weight)
        y = y if self.bias is None else y + self.bias
        return y.view(x.shape) if self.rows else y


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
        (Calls(lambda x: x * torch.sigmoid(x)), ["aten.silu.default"]),
        (Calls(lambda x: x * nn.functional.hardsigmoid(x)), ["aten.hardswish.default"]),
        (Product(), ["aten.linear.default"]),
        (Product(bias=False), ["aten.linear.default"]),
        (Product(rows=True), ["aten.linear.default"]),
        (Product(turn=torch.t), ["aten.linear.default"]),
    ],
    ids=[
        *("rms-norm", "shifted-rms-norm", "tanh-gelu", "tanh-gelu-by-products", "erf-gelu", "silu", "hardswish"),
        *("transposed", "transposed-without-bias", "transposed-of-rows", "by-t"),
    ],
)
def test_one_node(module: nn.Module, wanted: list[str]) -> None:
    x = torch.randn(3, 8)
    program = capture(module, (x,), dynamic_shapes={"x": {0: "rows"}})
    assert [str(node.target) for node in program.nodes() if node.op == "call_function"] == wanted
    torch.testing.assert_close(program(x)[0], module(x))


def test_other_numbers_stay() -> None:
    program = capture(Calls(other_gelu), (torch.randn(3, 8),))
    assert "aten.gelu.default" not in {str(node.target) for node in program.nodes()}


def test_other_products_stay() -> None:
    program = capture(Product(turn=torch.relu, bias=False), (torch.randn(3, 8),))
    assert "aten.linear.default" not in {str(node.target) for node in program.nodes()}
    program = capture(Calls(lambda x: x @ x.permute(1, 0)), (torch.randn(3, 8),))
    assert "aten.linear.default" not in {str(node.target) for node in program.nodes()}


def test_other_gates_stay() -> None:
    program = capture(Calls(lambda x: (x + 1) * torch.sigmoid(x)), (torch.randn(3, 8),))
    assert "aten.silu.default" not in {str(node.target) for node in program.nodes()}


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
    shapes: dict[str, list[int | str]] = {"q": ["n", 2, "s", 4], "k": ["n", 2, 4, "s"], "v": ["n", 2, "s", 4]}
    shapes |= {"mask": ["n", 1, 1, "s"], "bias": [1, 2, "s", "s"]}
    inputs = {name: ("float32", shape) for name, shape in shapes.items()}
    return model_of(nodes, inputs, ["r"], {"two": np.array(2, np.float32)})


def test_attention_with_a_bias_and_a_mask() -> None:
    for scaled_after in (False, True):
        model = attention_file(scaled_after=scaled_after)
        program = capture(model)
        found = "aten.scaled_dot_product_attention.default" in {str(node.target) for node in program.nodes()}
        assert found is not scaled_after and worst_error(program, model) < 1e-5


def gelu_file(kind: str, root: float) -> onnx.ModelProto:
    """Written with a product, as the normal distribution times x, and this by a quotient."""
    inner = helper.make_node("Div" if kind == "quotient" else "Mul", ["x", "root"], ["inner"])
    nodes = [inner, helper.make_node("Erf", ["inner"], ["erf"]), helper.make_node("Add", ["one", "erf"], ["sum"])]
    if kind == "halved":
        nodes += [helper.make_node("Mul", ["half", "x"], ["part"]), helper.make_node("Mul", ["part", "sum"], ["r"])]
    else:
        nodes += [helper.make_node("Mul", ["sum", "half"], ["part"]), helper.make_node("Mul", ["part", "x"], ["r"])]
    numbers = {"root": root, "one": 1.0, "half": 0.5}
    held = {name: np.array(value, np.float32) for name, value in numbers.items()}
    return model_of(nodes, {"x": ("float32", ["n", 4])}, ["r"], held)


@pytest.mark.parametrize(("kind", "root"), [("halved", 0.5**0.5), ("product", 0.5**0.5), ("quotient", 2**0.5)])
def test_gelu_of_tensorflow(kind: str, root: float) -> None:
    for number in (root, 0.9):
        model = gelu_file(kind, number)
        program = capture(model)
        found = [str(node.target) for node in program.nodes() if node.op == "call_function"]
        assert (found == ["aten.gelu.default"]) is (number == root) and worst_error(program, model) < 1e-5


def layer_norm_file(kind: str, axis: int) -> onnx.ModelProto:
    """By a quotient, as torch's exporter before opset 17, or by a factor, as TensorFlow."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[axis]),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Pow", ["centred", "two"], ["square"])
        if kind == "quotient"
        else helper.make_node("Mul", ["centred", "centred"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["variance"], axes=[axis]),
        helper.make_node("Add", ["variance", "epsilon"], ["raised"]),
        helper.make_node("Sqrt", ["raised"], ["root"]),
    ]
    if kind == "quotient":
        nodes += [
            helper.make_node("Div", ["centred", "root"], ["normal"]),
            helper.make_node("Mul", ["normal", "w"], ["scaled"]),
            helper.make_node("Add", ["scaled", "b"], ["r"]),
        ]
    else:
        nodes += [
            helper.make_node("Reciprocal", ["root"], ["inverse"]),
            helper.make_node("Mul", ["inverse", "w"], ["factor"]),
            helper.make_node("Mul", ["mean", "factor"], ["offset"]),
            helper.make_node("Sub", ["b", "offset"], ["rest"]),
            helper.make_node("Mul", ["x", "factor"], ["scaled"]),
            helper.make_node("Add", ["scaled", "rest"], ["r"]),
        ]
    held = {"two": np.array(2, np.float32), "epsilon": np.array(1e-5, np.float32)}
    held |= {name: np.linspace(0.5, value, 4).astype(np.float32) for name, value in (("w", 2), ("b", 1))}
    return model_of(nodes, {"x": ("float32", ["n", 4, 4])}, ["r"], held, opset=14)


@pytest.mark.parametrize("kind", ["quotient", "factor"])
def test_layer_norm_of_older_files(kind: str) -> None:
    for axis in (-1, 1):
        model = layer_norm_file(kind, axis)
        program = capture(model)
        found = [str(node.target) for node in program.nodes() if node.op == "call_function"]
        assert (found == ["aten.layer_norm.default"]) is (axis == -1) and worst_error(program, model) < 1e-5
