"""What every pass makes can be written as `.onnx`: valid, equal in ONNX Runtime, and it says what was done."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.capture.inputs import draw_inputs
from graphopt.program import provenance
from tests import models

CASES = {
    "gated-attention": "bert",
    "gated-attention{mode=elementwise}": "gpt2",
    "block-folding{remove=1}": "bert",
    "block-folding{mode=share,blocks=[0,1]}": "bert",
    "batch-norm-folding": "resnet",
    "merge-linears": "vit",
    "O2": "llama",
}


@functools.cache
def optimized(passes: str, name: str) -> Program:
    program = models.program(name)
    drawn = [draw_inputs(program, dict.fromkeys(program.sizes, 4), seed) for seed in range(10)]
    names = [spec.name for spec in program.inputs]
    data = [{name: value.numpy() for name, value in zip(names, values, strict=True)} for values in drawn]
    result = graphopt.optimize(program, passes, data=data, metric="cosine", verify="structure")
    assert any(item.rewrites for item in result.report.passes)
    return result.program


@functools.cache
def written(passes: str, name: str) -> bytes:
    """The file."""
    with tempfile.TemporaryDirectory() as folder:
        optimized(passes, name).to_onnx(f"{folder}/m.onnx")
        return Path(folder, "m.onnx").read_bytes()


def _model(passes: str, name: str) -> onnx.ModelProto:
    model = onnx.load_model_from_string(written(passes, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def _metadata(proto: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "name"), CASES.items(), ids=[f"{p}-{n}" for p, n in CASES.items()])
def test_runs_in_onnxruntime(passes: str, name: str) -> None:
    program, model = optimized(passes, name), _model(passes, name)
    session = onnxruntime.InferenceSession(written(passes, name))
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    wanted = [value.numpy() for value in program(*program.examples)]
    for got, value in zip(session.run(None, feed), wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5)
    for again, value in zip(capture(model)(*program.examples), wanted, strict=True):
        np.testing.assert_allclose(again, value, rtol=1e-4, atol=1e-5)


def test_the_file_says_what_was_done() -> None:
    program, model = optimized("gated-attention", "bert"), _model("gated-attention", "bert")
    made = [_metadata(node) for node in model.graph.node if "graphopt.rule" in _metadata(node)]
    assert {entry["graphopt.rule"] for entry in made} == {"gated-attention"}
    assert {name for entry in made for name in json.loads(entry["graphopt.from"])} == {
        name for node in program.nodes() for name in provenance(node).get("from", ())
    }
    assert json.loads(_metadata(model)["graphopt.rules"]) == {"gated-attention": len(made)}
    assert "model.encoder.layer.0.attention.self" in {
        _metadata(node).get("graphopt.module") for node in model.graph.node
    }
    assert model.producer_name == "graphopt"
    back = capture(model)
    assert "gated-attention" in {provenance(node).get("rule") for node in back.nodes()}


def test_no_path_of_the_machine_is_written() -> None:
    data = written("gated-attention", "bert")
    assert str(Path(torch.__file__).parents[1]).encode() not in data
    assert str(Path(__file__).parents[1]).encode() not in data and b"stack_trace" not in data


@pytest.mark.slow
def test_shared_weights_stay_shared() -> None:
    passes = "block-folding{mode=share,blocks=[0,1]}"
    program, model = optimized(passes, "bert"), _model(passes, "bert")
    held = sum(np.prod(proto.dims) for proto in model.graph.initializer if proto.data_type == onnx.TensorProto.FLOAT)
    assert held <= 1.05 * sum(value.numel() for value in program.graph_module.state_dict().values())


@pytest.mark.parametrize("text", ["no json", "7", '{"a": 1}', "[1]"])
def test_damaged_provenance_is_none(text: str) -> None:
    model = _model("gated-attention", "bert")
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key == "graphopt.from":
                entry.value = text
    assert not any(provenance(node).get("rule") == "gated-attention" for node in capture(model).nodes())


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.convolution = (
            torch.nn.Linear(8, 6),
            torch.nn.LayerNorm(6),
            torch.nn.Conv1d(6, 4, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.norm(self.linear(x)))
        return torch.softmax(self.convolution(x[..., None])[..., 0] * 2 + 0.5, -1)


class Integers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x.to(torch.int32) * 3).to(x.dtype), x.t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint16], ids=str)
def test_dtypes_are_written_and_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Layers().eval().to(dtype) if dtype.is_floating_point else Integers()
    x = torch.randn(3, 8).to(dtype) if dtype.is_floating_point else torch.arange(24).reshape(3, 8).to(dtype)
    program = capture(module, (x,))
    program.to_onnx(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    again = capture(tmp_path / "m.onnx")
    assert [spec.dtype for spec in (*again.inputs, *again.outputs)] == [dtype] * (1 + len(program.outputs))
    for found, want in zip(again(x), program(x), strict=True):
        assert torch.equal(found, want)
