"""Whole models that ONNX Runtime quantized: captured, fused, compiled, beside ONNX Runtime without optimizations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
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


class Vision(nn.Module):
    """A vision transformer of one layer: patches by a strided convolution, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32) / 5)
        self.qkv = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.out, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms, self.head = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)]), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token, self.patches(x).flatten(2).transpose(1, 2)), 1) + self.positions
        y = self.norms[0](x)
        q, k, v = (linear(y).view(1, 17, 4, 8).transpose(1, 2) for linear in self.qkv)
        y = torch.softmax(q * 8**-0.5 @ k.transpose(-1, -2), -1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(1, 17, 32))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        result: Tensor = self.head(x[:, 0])
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
    "vision": (Vision, torch.zeros(1, 3, 16, 16)),
}
KINDS: dict[str, dict[str, Any]] = {
    "signed": {"activation_type": QuantType.QInt8},
    "unsigned": {"activation_type": QuantType.QUInt8, "per_channel": True},
    "operators": {"activation_type": QuantType.QUInt8, "quant_format": QuantFormat.QOperator},
    "unsigned weights": {"weight_type": QuantType.QUInt8, "activation_type": QuantType.QUInt8},
}
RARE: dict[str, dict[str, Any]] = {
    "operators per channel": {"quant_format": QuantFormat.QOperator, "per_channel": True},
    "entropy": {"calibrate_method": CalibrationMethod.Entropy, "per_channel": True},
    "percentile": {"calibrate_method": CalibrationMethod.Percentile},
    "unsigned weights per channel": {
        **{"weight_type": QuantType.QUInt8, "activation_type": QuantType.QUInt8},
        **{"per_channel": True, "reduce_range": True},
    },
    "narrow weights": {"reduce_range": True, "per_channel": True},
    "weights with zero points": {"per_channel": True, "extra_options": {"WeightSymmetric": False}},
    "float biases": {"per_channel": True, "extra_options": {"QuantizeBias": False}},
    "every pair": {"extra_options": {"DedicatedQDQPair": True, "AddQDQPairToWeight": True}, "per_channel": True},
    "four bits": {"weight_type": QuantType.QInt4, "per_channel": True},
}


def exported(name: str, path: str, opset: int) -> None:
    model, inputs = MODELS[name]
    torch.manual_seed(0)
    torch.onnx.export(
        model().eval(), (draw(inputs, 0),), path, input_names=["x"], dynamo=False, opset_version=17, verbose=False
    )
    if opset > 17:
        newer = onnx.version_converter.convert_version(onnx.load(path), opset)
        newer.ir_version = 10
        onnx.save(newer, path)


def quantized_file(name: str, options: dict[str, Any], folder: Path) -> str:
    plain, quantized = str(folder / "plain.onnx"), str(folder / "quantized.onnx")
    exported(name, plain, 21 if options.get("weight_type") == QuantType.QInt4 else 17)
    quantize_static(plain, quantized, Samples(MODELS[name][1]), **{"quant_format": QuantFormat.QDQ, **options})
    return quantized


def without_optimizations(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options)


@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow, id=kind.replace(" ", "-")) for kind in RARE)]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_onnxruntime_quantized(name: str, kind: str, tmp_path: Path) -> None:
    """No operator falls back, and results are those of ONNX Runtime: cosine 0.9999, first choice the same."""
    quantized = quantized_file(name, {**KINDS, **RARE}[kind], tmp_path)
    program = graphopt.capture(quantized)
    result = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}")
    operators = {str(node.target) for node in result.program.nodes()}
    assert not {"aten.linear.default", "aten.conv2d.default", "aten.matmul.default"} & operators
    session, theirs = graphopt.compile(result.program, threads=2).session(), without_optimizations(quantized)
    inputs = [draw(MODELS[name][1], seed) for seed in range(10, 20)]
    ours, wanted = (
        np.stack([run(None, {"x": x.numpy()})[0].ravel() for x in inputs]).astype(np.float64)
        for run in (session.run, theirs.run)
    )
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(wanted, axis=1)
    assert np.mean((ours * wanted).sum(1) / lengths) >= 0.9999
    assert np.array_equal(ours.argmax(1), wanted.argmax(1))
    assert np.abs(program(inputs[0])[0].numpy().ravel() - ours[0]).max() <= np.abs(wanted).max() / 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_listed_with_reasons(name: str, tmp_path: Path) -> None:
    quantized = quantized_file(name, {"activation_type": QuantType.QInt16}, tmp_path)
    program = graphopt.capture(quantized)
    last = graphopt.optimize(program, "O2,qdq-fusion").report.passes[-1]
    fallbacks = [item.reason for item in last.declined if item.rule == "qdq-fusion/fallback"]
    assert fallbacks and all("has codes of int16: integer kernels take 8 bits" in reason for reason in fallbacks)
    x = draw(MODELS[name][1], 10)
    (wanted,) = without_optimizations(quantized).run(None, {"x": x.numpy()})
    assert np.abs(program(x)[0].numpy() - wanted).max() <= np.abs(wanted).max() / 50
