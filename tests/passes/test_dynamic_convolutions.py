"""Convolutions of codes with computed scales: the specification, kernels, and the forms that quantizers write."""

from __future__ import annotations

from collections.abc import Mapping
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


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


def test_sums_are_those_of_integers() -> None:
    """What is padded stands for 0, whatever the zero point is."""
    x, weight = codes(2, 6, 5, 7), (codes(4, 3, 3, 2, seed=1).int() - 100).to(torch.int16)
    scale, zero = torch.tensor(0.03), torch.tensor(201, dtype=torch.uint8)
    steps, bias = draw(4, seed=3).abs() / 100, draw(4, seed=4)
    options = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
    found = ops.dynamic_qconv(x, scale, zero, weight, steps, bias, **options)
    total = nn.functional.conv2d(x.double() - 201, weight.double(), None, [2, 1], [1, 2], [1, 2], 2)
    factor = (scale * steps).double()[:, None, None]
    assert torch.equal(found, (total * factor + bias.double()[:, None, None]).float())


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, one, zero = codes(1, 4, 5, 5), codes(2, 4, 3, 3), torch.tensor(1.0), torch.tensor(3, dtype=torch.uint8)
    options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    for given, message in (
        ((x, one, zero.to(torch.int8), weight.to(torch.int8), one, None), "zero points of their type"),
        ((x, one, zero, weight, one, None), "not torch.uint8"),
        ((x[:, 1:], one, zero, weight.to(torch.int8), one, None), "do not fit images"),
        ((x, torch.ones(1, 1, 1, 1), zero, weight.to(torch.int8), one, None), "of no axes"),
    ):
        with pytest.raises(UsageError, match=message):
            ops.dynamic_qconv(*given, **options)


class Convolutions(nn.Module):
    """Strided, 1 x 1, of three channels, in groups of any size, depthwise, dilated; every second weight is int16."""

    CASES: tuple[tuple[int, int, int, Mapping[str, Any]], ...] = (
        (12, 20, 3, {"padding": [1, 1], "stride": [2, 2]}),
        (16, 24, 1, {}),
        (3, 16, 5, {"padding": [2, 0]}),
        (16, 32, 3, {"groups": 4, "padding": [1, 1]}),
        (12, 12, 3, {"groups": 4, "padding": [1, 1]}),
        (24, 24, 3, {"groups": 24, "padding": [1, 0]}),
        (8, 9, 3, {"dilation": [2, 1]}),
    )

    def __init__(self) -> None:
        super().__init__()
        weights = [codes(o, c // d.get("groups", 1), t, t, seed=o).int() for c, o, t, d in self.CASES]
        narrow = [(w - 128).to(torch.int8) if n % 2 else (w - 77).to(torch.int16) for n, w in enumerate(weights)]
        self.weights = nn.ParameterList([nn.Parameter(weight, False) for weight in narrow])
        self.steps = nn.ParameterList([nn.Parameter(draw(o, seed=o).abs() / 50, False) for _, o, *_ in self.CASES])
        self.biases = nn.ParameterList([nn.Parameter(draw(o, seed=o), False) for _, o, *_ in self.CASES])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        image, scale, zero = ops.dynamic_quantize(x)
        found = []
        for weight, step, bias, (channels, _, _, given) in zip(
            self.weights, self.steps, self.biases, self.CASES, strict=True
        ):
            options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **given}
            found.append(ops.dynamic_qconv(image[:, :channels], scale, zero, weight, step, bias, **options))
        return tuple(found)


@pytest.mark.parametrize(
    "target", ["cpu", *(pytest.param(f"cpu:{kind}", marks=pytest.mark.slow) for kind in ("x86-64-v3", "aarch64"))]
)
def test_kernels_give_the_specification(target: str) -> None:
    x = draw(2, 24, 9, 11)
    program = graphopt.capture(Convolutions(), (x,), dynamic_shapes={"x": {0: "batch"}})
    artifact = graphopt.compile(program, target=target, threads=2)
    if target != "cpu":  # compiling has compared them
        return
    for batch in (1, 3):
        x = draw(batch, 24, 9, 11, seed=batch) + 0.3
        for found, wanted in zip(artifact.session().run(None, {"x": x.numpy()}), program(x), strict=True):
            assert np.abs(found - wanted.numpy()).max() <= 2e-6 * wanted.abs().max()


class Layers(nn.Module):
    """An image network with a depthwise layer, and one of sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.each = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.last, self.line = nn.Conv2d(16, 8, 1, bias=False), nn.Conv1d(8, 12, 3, padding=2, dilation=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.last(torch.relu(self.each(torch.relu(self.stem(x))))))
        x = torch.relu(self.line(x.flatten(2)))
        result: Tensor = self.head(x.mean(2))
        return result


@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize("options", [{"weight_type": QuantType.QUInt8}, {"weight_type": QuantType.QInt8}])
def test_a_model_that_onnxruntime_quantized_dynamically(options: dict[str, Any], tmp_path: Path) -> None:
    plain, quantized = str(tmp_path / "plain.onnx"), str(tmp_path / "quantized.onnx")
    inputs = (draw(1, 3, 12, 12),)
    torch.onnx.export(Layers().eval(), inputs, plain, input_names=["x"], dynamo=False, opset_version=17, verbose=False)
    quantize_dynamic(plain, quantized, **options)
    program = graphopt.capture(quantized)
    result = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}")
    assert not result.report.passes[-1].declined
    assert names(result.program).count("graphopt.dynamic_qconv") == 4
    assert not {"aten.conv2d", "aten.conv1d", "graphopt.dequantize"} & set(names(result.program))
    session = graphopt.compile(result.program, threads=2).session()
    for seed in range(5):
        x = draw(1, 3, 12, 12, seed=seed)
        (ours,) = session.run(None, {"x": x.numpy()})
        assert np.abs(ours - program(x)[0].numpy()).max() <= 0.02 * np.abs(ours).max()
    if options["weight_type"] == QuantType.QUInt8:  # ConvInteger of int8 is not implemented there
        theirs = onnxruntime.InferenceSession(quantized)
        (wanted,) = theirs.run(None, {"x": x.numpy()})
        assert np.abs(ours - wanted).max() <= 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
def test_quantize_with_dynamic_activations(weights: str) -> None:
    x = draw(1, 3, 12, 12)
    program = graphopt.capture(Layers().eval(), (x,))
    passes = f"quantize{{activations=dynamic-int8,granularity={weights}}},qdq-fusion{{fail-on-fallback=true}}"
    fused = graphopt.optimize(program, passes).program
    assert names(fused).count("graphopt.dynamic_qconv") == 4 and "graphopt.dynamic_qlinear" in names(fused)
    (found,) = graphopt.compile(fused, threads=2).session().run(None, {"x": x.numpy()})
    assert np.abs(found - program(x)[0].detach().numpy()).max() < 0.05
