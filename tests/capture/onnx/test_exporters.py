"""Whole models from both exporters of torch: the same answers, operators and rewrites as from torch itself."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.capture.inputs import draw_inputs
from tests import models
from tests.capture.onnx.tiny import worst_error

EXPORTERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "opset_version": 20},
    "torchscript": {"dynamo": False, "opset_version": 17},
}
TRANSFORMERS = ("bert", "gpt2", "llama", "vit")
COUNTED = ("linear", "matmul", "layer_norm", "rms_norm", "scaled_dot_product_attention", "gelu", "silu")
# torch's own export of these two fails
FAILS = {("swin", "dynamo"), ("t5_encoder", "dynamo")}
slow = pytest.mark.slow


@functools.cache
def exported(name: str, exporter: str, dynamic: bool, folder: Path) -> str:
    """The path of the model as ONNX."""
    module, inputs, axes = models.ALL[name]() if name in models.ALL else models.ZOO[name]()
    names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    options = dict(EXPORTERS[exporter])
    if dynamic:
        options["dynamic_shapes" if options["dynamo"] else "dynamic_axes"] = dict(axes)
    path = folder / f"{name}-{exporter}-{dynamic}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, path, input_names=names, output_names=["out"], verbose=False, **options)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def operators(program: Program) -> dict[str, int]:
    """How many of the composites there are."""
    targets = (str(node.target) for node in program.nodes() if node.op == "call_function")
    found = Counter(target.split(".")[-2] for target in targets if target.startswith("aten."))
    found["linear"] += found.pop("addmm", 0)  # of GPT-2
    return {key: found[key] for key in COUNTED}


def same_operators(program: Program, name: str) -> None:
    assert operators(program) == operators(models.program(name))


def test_bert(folder: Path) -> None:
    path = exported("bert", "torchscript", True, folder)
    program = capture(path)
    assert [spec.name for spec in program.inputs] == ["input_ids", "attention_mask"]
    assert [spec.shape for spec in program.inputs] == [("batch", "seq")] * 2
    assert [spec.domain.kind for spec in program.inputs] == ["ids", "mask"]
    assert program.outputs[0].name == "out" and program.outputs[0].shape == ("batch", "seq", 32)
    assert program.sizes["seq"].high == 40  # rows of the position table
    assert "model.embeddings.word_embeddings.weight" in dict(program.graph_module.named_parameters())
    assert worst_error(program, path) < 1e-5
    same_operators(program, "bert")


@slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    "name", [*TRANSFORMERS, "t5_encoder", "swin", "resnet", "mobilenet_v2", "convnext", "mlp", "conv_net"]
)
def test_agrees_with_onnxruntime(name: str, exporter: str, dynamic: bool, folder: Path) -> None:
    if (name, exporter) in FAILS:
        pytest.skip("torch cannot export it this way")
    path = exported(name, exporter, dynamic, folder)
    program = capture(path)
    assert bool(program.sizes) == dynamic
    assert worst_error(program, path) < 1e-5
    if name in TRANSFORMERS:
        same_operators(program, name)


@slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_passes_fire_as_on_the_torch_form(name: str, exporter: str, folder: Path) -> None:
    program = capture(exported(name, exporter, True, folder))
    for passes in ("gated-attention", "block-folding{remove=1}"):
        fired = [_fired(form, passes) for form in (models.program(name), program)]
        assert fired[0] == fired[1] > 0


def _fired(program: Program, passes: str) -> int:
    drawn = [draw_inputs(program, dict.fromkeys(program.sizes, 4), seed) for seed in range(10)]
    names = [spec.name for spec in program.inputs]
    data = [{name: value.numpy() for name, value in zip(names, values, strict=True)} for values in drawn]
    result = graphopt.optimize(program, passes, data=data, metric="cosine", verify="structure")
    return sum(len(item.rewrites) for item in result.report.passes)


@slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_compiles(name: str, exporter: str, folder: Path) -> None:
    program = capture(exported(name, exporter, True, folder))
    session = graphopt.compile(program, target="cpu").session()
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    (ours,), (theirs,) = session.run(None, feed), program(*program.examples)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_written_and_read_again(tmp_path: Path) -> None:
    program = models.program("mlp")
    program.to_onnx(str(tmp_path / "m.onnx"))
    again = capture(tmp_path / "m.onnx")
    assert again.inputs == program.inputs and again.outputs == program.outputs
    again.save(str(tmp_path / "m.pt2"))
    values = draw_inputs(program, dict.fromkeys(program.sizes, 3), 0)
    for form in (again, capture(tmp_path / "m.pt2")):
        torch.testing.assert_close(form(*values), program(*values))
