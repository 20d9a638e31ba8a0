"""Linears of codes with computed scales: the specification, the two forms that are fused, kernels, ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError
from graphopt.operators import dynamic_products  # noqa: F401
from graphopt.program import Program

ops = torch.ops.graphopt
F32 = torch.float32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(33, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(torch.tanh(self.second(torch.relu(self.first(x)))))
        return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_sums_are_those_of_integers(dtype: torch.dtype) -> None:
    x, weight = codes(2, 3, 20, dtype=dtype), codes(5, 20, dtype=torch.int8, seed=1)
    scale, zero = draw(2, 3, 1).abs() / 50, codes(2, 3, 1, dtype=dtype, seed=2)
    steps, bias = draw(5, seed=3).abs() / 100, draw(5, seed=4)
    found = ops.dynamic_qlinear(x, scale, zero, weight, steps, bias)
    total = (x.long() - zero.long()) @ weight.long().t()
    assert torch.equal(found, (total.double() * (scale * steps).double() + bias.double()).float())
    most, least = torch.full((1, 40000), 255, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)
    one = torch.tensor(1.0)
    wide = ops.dynamic_qlinear(most, one, least, torch.full((1, 40000), 127, dtype=torch.int8), one, None)
    assert wide.item() == torch.tensor(255 * 127 * 40000).float().item()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, one = codes(2, 20), codes(5, 20, dtype=torch.int8), torch.tensor(1.0)
    zero = torch.tensor(3, dtype=torch.uint8)
    for given, message in (
        ((x, one, zero.to(torch.int8), weight, one, None), "zero points of their type"),
        ((x, one, zero, weight[:, 1:], one, None), "does not fit rows of 20"),
        ((x, one, zero, weight, torch.ones(4), None), "do not fit 5 outputs"),
        ((x, torch.ones(2), zero, weight, one, None), "do not fit rows of codes"),
    ):
        with pytest.raises(UsageError, match=message):
            ops.dynamic_qlinear(*given)
    with pytest.raises(UsageError, match="no gradient"):
        ops.dynamic_qlinear(x, one.clone().requires_grad_(), zero, weight, one, None)


class Product(nn.Module):
    def __init__(self, k: int, n: int, rows: bool, bias: bool) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("weight", codes(n, k, dtype=torch.int8, seed=1))
        self.register_buffer("steps", draw(n, seed=2).abs() / 100)
        self.register_buffer("bias", draw(n, seed=3) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        given = ops.dynamic_quantize(x, axis=x.dim() - 1) if self.rows else ops.dynamic_quantize(x)
        result: Tensor = ops.dynamic_qlinear(*given, self.weight, self.steps, self.bias)
        return torch.relu(result)


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3", "cpu:x86-64-v4-vnni"])
@pytest.mark.parametrize("rows", [False, True])
def test_kernels_give_the_specification(target: str, rows: bool) -> None:
    for k, n, bias in ((64, 48, True), (37, 5, False)):
        module, x = Product(k, n, rows, bias), draw(2, 9, k)
        try:
            session = graphopt.compile(graphopt.capture(module, (x,)), target=target, threads=1).session()
        except graphopt.errors.GraphoptError as e:
            pytest.skip(str(e))
        (found,) = session.run(None, {"x": x.numpy()})
        wanted = module(x).numpy()
        assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
def test_quantize_with_dynamic_activations(weights: str) -> None:
    program = graphopt.capture(Layers().eval(), (draw(6, 33),))
    passes = f"quantize{{activations=dynamic-int8,granularity={weights}}},qdq-fusion{{fail-on-fallback=true}}"
    fused = graphopt.optimize(program, passes).program
    assert names(fused).count("graphopt.dynamic_qlinear") == 3 and "aten.linear" not in names(fused)
    x = draw(6, 33, seed=9)
    (found,) = graphopt.compile(fused, threads=2).session().run(None, {"x": x.numpy()})
    assert np.abs(found - program(x)[0].detach().numpy()).max() < 0.05


@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"weight_type": QuantType.QUInt8}])
def test_a_model_that_onnxruntime_quantized_dynamically(options: dict[str, Any], tmp_path: Path) -> None:
    plain, quantized = str(tmp_path / "plain.onnx"), str(tmp_path / "quantized.onnx")
    torch.onnx.export(
        Layers().eval(), (draw(2, 5, 33),), plain, input_names=["x"], dynamo=False, opset_version=17, verbose=False
    )
    quantize_dynamic(plain, quantized, **options)
    program = graphopt.capture(quantized)
    result = graphopt.optimize(program, "O2,qdq-fusion")
    reasons = [item.reason for item in result.report.passes[-1].declined]
    assert names(result.program).count("graphopt.dynamic_qlinear") == 3 and not reasons
    assert not {"aten.linear", "aten.matmul", "graphopt.dequantize"} & set(names(result.program))
    session = graphopt.compile(result.program, threads=2).session()
    theirs_options = onnxruntime.SessionOptions()
    theirs_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = onnxruntime.InferenceSession(quantized, theirs_options)
    for seed in range(5):
        x = draw(2, 5, 33, seed=seed).numpy()
        (ours,), (wanted,) = session.run(None, {"x": x}), theirs.run(None, {"x": x})
        assert np.abs(ours - wanted).max() <= 0.01 * np.abs(wanted).max()
