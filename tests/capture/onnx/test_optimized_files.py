"""Files that ONNX Runtime's tools optimized: the operators, answers and normal form of the model they came from."""

from __future__ import annotations

import inspect
import warnings
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
from graphopt.errors import CaptureError
from tests import models
from tests.capture.onnx.test_exporters import TRANSFORMERS, exported, operators, same_operators
from tests.capture.onnx.test_quantization import quantized_file
from tests.capture.onnx.tiny import worst_error

pytestmark = pytest.mark.slow

Case = tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, dict[int, str]]]


def saved(path: str, folder: Path, level: str = "EXTENDED") -> str:
    """What ONNX Runtime writes after its own graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options)
    return str(options.optimized_model_filepath)


def fused(case: Case, kind: str, folder: Path, **settings: bool) -> str:
    """What onnxruntime.transformers.optimizer makes of a model whose attention is written out."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    module, inputs, axes = case
    module.model.set_attn_implementation("eager")  # type: ignore[operator, union-attr]
    names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    plain, result = folder / "plain.onnx", folder / "fused.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, inputs, plain, input_names=names, output_names=["out"], dynamic_axes=axes, opset_version=17,
            dynamo=False, verbose=False,
        )  # fmt: skip
        options = FusionOptions(kind)
        for name, value in settings.items():
            setattr(options, name, value)
        model = optimizer.optimize_model(
            str(plain), kind, num_heads=4, hidden_size=32, opt_level=0, optimization_options=options
        )
        model.save_model_to_file(str(result))
    return str(result)


def own_operators(path: str) -> set[str]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.op_type for node in nodes if node.domain or node.op_type == "SimplifiedLayerNormalization"}


def compiled_agrees(program: Program, path: str) -> None:
    session = graphopt.compile(program, "cpu").session()
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    theirs = onnxruntime.InferenceSession(path).run(None, feed)
    for a, b in zip(session.run(None, feed), theirs, strict=True):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


class Encoder(torch.nn.Module):
    """An encoder by its one input, returning its last states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(values).last_hidden_state
        return states


def whisper_encoder() -> Case:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=12,
    )  # fmt: skip
    torch.manual_seed(0)
    return Encoder(WhisperEncoder(config)).eval(), (torch.randn(2, 8, 24),), {"values": {0: "batch"}}


def clip() -> Case:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    return Encoder(CLIPVisionModel(config)).eval(), (torch.randn(2, 3, 16, 16),), {"values": {0: "batch"}}


NORM = "SkipLayerNormalization"
ROOT = "SkipSimplifiedLayerNormalization"
FUSED: list[tuple[Any, str, dict[str, bool], set[str]]] = [
    (models.bert, "bert", {}, {"EmbedLayerNormalization", "Attention", NORM, "BiasGelu"}),
    (models.bert, "bert", {"use_multi_head_attention": True}, {"MultiHeadAttention", NORM, "BiasGelu"}),
    (models.gpt2, "gpt2", {}, {NORM, "FastGelu"}),
    (models.vit, "vit", {}, {NORM, "BiasGelu"}),
    (models.llama, "gpt2", {}, {ROOT, "SimplifiedLayerNormalization"}),
    (models.t5_encoder, "t5", {}, {ROOT, "SimplifiedLayerNormalization"}),
    (clip, "clip", {}, {"Attention", NORM, "QuickGelu"}),
    (whisper_encoder, "bart", {}, {NORM, "BiasGelu", "Gelu"}),
]


@pytest.mark.parametrize(("make", "kind", "settings", "expected"), FUSED)
def test_optimizer_of_transformers(
    make: Any, kind: str, settings: dict[str, bool], expected: set[str], tmp_path: Path
) -> None:
    module, inputs, axes = make()
    wanted = operators(capture(module, inputs, dynamic_shapes=axes))
    path = fused(make(), kind, tmp_path, **settings)
    assert expected <= own_operators(path)
    program = capture(path)
    assert worst_error(program, path) < 1e-5
    assert operators(program) == wanted
    if "Attention" in expected and make is not clip:
        compiled_agrees(program, path)


@pytest.mark.parametrize(
    ("name", "exporter", "expected"),
    [
        ("bert", "torchscript", {"BiasGelu", "FusedMatMul"}),
        ("bert", "dynamo", {"BiasGelu", "FusedMatMul", NORM}),
        ("gpt2", "torchscript", {"FastGelu", "FusedMatMul"}),
        ("llama", "torchscript", {"QuickGelu", "SimplifiedLayerNormalization", "FusedMatMul"}),
        ("vit", "dynamo", {"BiasGelu", "FusedMatMul", NORM}),
        ("resnet", "torchscript", {"FusedConv"}),
        ("conv_net", "torchscript", {"FusedConv"}),
    ],
)
def test_saved_sessions(name: str, exporter: str, expected: set[str], tmp_path: Path) -> None:
    path = saved(exported(name, exporter, True, tmp_path), tmp_path)
    assert expected <= own_operators(path)
    program = capture(path)
    assert worst_error(program, path) < 1e-5
    if name in TRANSFORMERS:
        same_operators(program, name)
    if name == "conv_net":
        compiled_agrees(program, path)


def test_layouts_of_one_processor_are_refused(tmp_path: Path) -> None:
    path = exported("conv_net", "torchscript", True, tmp_path)
    with pytest.raises(CaptureError, match=r"com\.microsoft\.nchwc\.Conv \(.*\); .*save it with ORT_ENABLE_EXTENDED"):
        capture(saved(path, tmp_path, "ALL"))


def test_a_session_saved_with_all_optimizations_where_no_layout_changed(tmp_path: Path) -> None:
    path = saved(exported("bert", "torchscript", True, tmp_path), tmp_path, "ALL")
    program = capture(path)
    assert worst_error(program, path) < 1e-5
    same_operators(program, "bert")


def test_quantized_after_it_was_optimized(tmp_path: Path) -> None:
    """Attention becomes QAttention."""
    from onnxruntime.quantization import quantize_dynamic

    path = fused(models.bert(), "bert", tmp_path)
    settings = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what com.microsoft's operators give
    quantize_dynamic(path, tmp_path / "small.onnx", extra_options=settings)
    assert "QAttention" in own_operators(str(tmp_path / "small.onnx"))
    assert worst_error(capture(tmp_path / "small.onnx"), str(tmp_path / "small.onnx")) < 1e-5


def test_optimized_after_it_was_quantized(tmp_path: Path) -> None:
    """Convolutions of codes have their channels last then, on every processor."""
    path = saved(str(quantized_file("conv_net", "QDQ", tmp_path)), tmp_path, "ALL")
    assert {"QLinearConv", "QGemm"} <= own_operators(path)
    assert worst_error(capture(path), path) < 1e-5
