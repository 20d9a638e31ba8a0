"""Composites that torch modules write out are one node, as they are from ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture


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
