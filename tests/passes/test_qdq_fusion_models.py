"""Whole models that ONNX Runtime quantized: captured, fused, compiled, beside ONNX Runtime without optimizations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

import graphopt

F = nn.functional


class Residual(nn.Module):
    """A residual network of two blocks, the second with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, 2, 2)
        self.first, self.second = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.short, self.head = nn.Conv2d(16, 24, 1, 2), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(x + self.first(x))
        x = torch.relu(self.second(x) + self.short(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Inverted(nn.Module):
    """An inverted bottleneck with depthwise filters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 8, 1)
        self.each, self.head = nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu6(self.each(F.relu6(self.up(x)))))
        result: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


class Encoder(nn.Module):
    """One layer of a transformer, its attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.qkv = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.out, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (linear(x).view(1, -1, 4, 8).transpose(1, 2) for linear in self.qkv)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        x = self.norms[0](x + self.out((weights @ v).transpose(1, 2).reshape(x.shape)))
        result: Tensor = self.norms[1](x + self.down(F.gelu(self.up(x))))
        return result


class Samples(CalibrationDataReader):
    def __init__(self, inputs: Tensor) -> None:
        self.left: Iterator[Any] = iter([{"x": draw(inputs, seed).numpy()} for seed in range(4)])

    def get_next(self) -> Any:
        return next(self.left, None)


def draw(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator)
    return torch.randint(0, 50, like.shape, generator=generator)


MODELS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "residual": (Residual, torch.zeros(1, 3, 32, 32)),
    "inverted": (Inverted, torch.zeros(1, 3, 16, 16)),
    "encoder": (Encoder, torch.zeros(1, 12, dtype=torch.int64)),
}


@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize("kind", ["signed", "unsigned", "operators"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_onnxruntime_quantized(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]
    torch.manual_seed(0)
    plain, quantized = str(tmp_path / "plain.onnx"), str(tmp_path / "quantized.onnx")
    torch.onnx.export(
        model().eval(), (draw(inputs, 0),), plain, input_names=["x"], dynamo=False, opset_version=17, verbose=False
    )
    quantize_static(
        plain,
        quantized,
        Samples(inputs),
        quant_format=QuantFormat.QOperator if kind == "operators" else QuantFormat.QDQ,
        per_channel=kind == "unsigned",
        activation_type=QuantType.QInt8 if kind == "signed" else QuantType.QUInt8,
    )
    program = graphopt.capture(quantized)
    result = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}")
    fused = result.program
    operators = {str(node.target) for node in fused.nodes()}
    assert not {"aten.linear.default", "aten.conv2d.default", "aten.matmul.default"} & operators
    session = graphopt.compile(fused, threads=2).session()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = onnxruntime.InferenceSession(quantized, options)
    for seed in (10, 11):
        x = draw(inputs, seed)
        (ours,), (wanted,) = session.run(None, {"x": x.numpy()}), theirs.run(None, {"x": x.numpy()})
        before = program(x)[0].numpy()
        step = np.abs(wanted).max() / 100
        assert np.abs(ours - before).max() <= step
        assert np.abs(ours - wanted).max() <= step
