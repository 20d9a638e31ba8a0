"""The operators that ONNX Runtime's optimizers write, one by one and in whole files, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.test_exporters import TRANSFORMERS, exported, same_operators
from tests.capture.onnx.tiny import Array, imported, model_of, worst_error

DOMAIN = "com.microsoft"


def floats(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) / 2


@dataclass(frozen=True)
class Case:
    """One node: inputs by the names of sizes or numbers, then weights; None is an input left out."""

    name: str
    inputs: tuple[Any, ...] = (("n", "m", 8),)
    weights: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("r",)
    dtypes: tuple[str, ...] = ()
    label: str = ""
    domain: str = DOMAIN

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name

    def model(self) -> onnx.ModelProto:
        inputs, names = {}, []
        for name, shape, dtype in zip("xyzuvwst", self.inputs, [*self.dtypes, *["float32"] * 8], strict=False):
            names.append("" if shape is None else name)
            if shape is not None:
                inputs[name] = (dtype, shape)
        weights = {name: value for name, value in zip("abcdefgh", self.weights, strict=False) if value is not None}
        names += [name if value is not None else "" for name, value in zip("abcdefgh", self.weights, strict=False)]
        first = self.attributes.get("_weights_after", len(self.inputs))
        names = [*names[:first], *names[len(self.inputs) :], *names[first : len(self.inputs)]]
        attributes = {name: value for name, value in self.attributes.items() if not name.startswith("_")}
        node = helper.make_node(self.name, names, self.outputs, domain=self.domain, **attributes)
        model = model_of([node], inputs, [name for name in self.outputs if name], weights)
        for output in model.graph.output:
            integers = output.name == "kept"
            output.type.tensor_type.elem_type = onnx.TensorProto.INT32 if integers else onnx.TensorProto.FLOAT
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return model


WHOLE = ("n", "m", 8)
HEADS: dict[str, Any] = {"num_heads": 2}
SELF: dict[str, Any] = {**HEADS, "_weights_after": 1}
PROJECTIONS = (floats(8, 24), floats(24))
TOKENS = ("n", "m")
TABLES = (None, floats(20, 8), floats(16, 8), None, floats(8), floats(8))  # without segments
IDS = ("int32", "int32", "int32")
PAST = (2, "n", 2, "p", 4)
CASES = [
    Case("Gelu"),
    Case("BiasGelu", weights=(floats(8),)),
    Case("FastGelu"),
    Case("FastGelu", weights=(floats(8),), label="bias"),
    Case("QuickGelu"),
    Case("QuickGelu", attributes={"alpha": 1.0}, label="silu"),
    Case("FusedMatMul", (WHOLE, ("n", "k", 8)), attributes={"transB": 1, "alpha": 0.5}),
    Case("FusedMatMul", (("n", 8, "m"), ("n", 8, "k")), attributes={"transA": 1}, label="left"),
    Case("FusedGemm", (("n", 8),), (floats(8, 5), floats(5)), {"activation": "Relu"}),
    Case("FusedGemm", (("n", 8),), (floats(8, 5), floats(5)),
         {"activation": "LeakyRelu", "activation_alpha": 0.3}, label="leaky"),
    Case("FusedConv", (("n", 4, 6, 6),), (floats(5, 4, 3, 3), floats(5)), {"activation": "Relu"}),
    Case("FusedConv", (("n", 4, 6, 6),), (floats(5, 4, 3, 3), floats(5)),
         {"activation": "Clip", "activation_params": [-0.2, 0.3]}, label="clip"),
    Case("SkipLayerNormalization", (WHOLE, WHOLE), (floats(8), floats(8))),
    Case("SkipLayerNormalization", (WHOLE, WHOLE), (floats(8), floats(8), floats(8)), {"epsilon": 1e-5},
         ("r", "", "", "total"), label="sum"),
    Case("SkipSimplifiedLayerNormalization", (WHOLE, WHOLE), (floats(8),), {"epsilon": 1e-6}, ("r", "", "", "total")),
    Case("SimplifiedLayerNormalization", weights=(floats(8),), attributes={"epsilon": 1e-6}, domain=""),
    Case("EmbedLayerNormalization", (TOKENS,) * 2, TABLES, {"_weights_after": 1}, ("r", "kept"), IDS),
    Case("EmbedLayerNormalization", (TOKENS,) * 3, (*TABLES[1:3], floats(2, 8), *TABLES[4:]), {"_weights_after": 2},
         ("r", "kept", "total"), IDS, label="segments"),
    Case("Attention", (WHOLE,), PROJECTIONS, SELF),
    Case("Attention", (WHOLE,), PROJECTIONS, {**SELF, "unidirectional": 1, "scale": 0.3}, label="causal"),
    Case("Attention", (WHOLE, ("n", "m")), PROJECTIONS, SELF, dtypes=("float32", "int32"), label="mask"),
    Case("Attention", (WHOLE, ("n",)), PROJECTIONS, SELF, dtypes=("float32", "int32"), label="lengths"),
    Case("Attention", (WHOLE, None, None, ("n", 2, "m", "m")), PROJECTIONS, SELF, label="added"),
    Case("Attention", (WHOLE, None, PAST), PROJECTIONS, {**SELF, "unidirectional": 1}, ("r", "present"), label="past"),
    Case("Attention", (WHOLE,), (floats(8, 28), floats(28)), {**SELF, "qkv_hidden_sizes": [8, 8, 12]}, label="widths"),
    Case("MultiHeadAttention", (WHOLE, ("n", "t", 8), ("n", "t", 8)), (), HEADS),
    Case("MultiHeadAttention", (WHOLE, WHOLE, WHOLE), (floats(24),), {**HEADS, "unidirectional": 1}, label="bias"),
    Case("MultiHeadAttention", (WHOLE, ("n", "t", 8), ("n", "t", 8), None, ("n", "t")), (), HEADS,
         dtypes=("float32", "float32", "float32", "float32", "int32"), label="padding"),
    Case("MultiHeadAttention", (WHOLE, WHOLE, WHOLE, None, None, None, ("n", 2, "p", 4), ("n", 2, "p", 4)), (), HEADS,
         ("r", "key", "value"), label="past"),
    Case("RotaryEmbedding", (("n", 2, "m", 8), ("n", "m")), (floats(16, 4),) * 2, dtypes=("float32", "int64")),
    Case("RotaryEmbedding", (("n", "m", 16), ("n", "m")), (floats(16, 4),) * 2, {"interleaved": 1},
         dtypes=("float32", "int64"), label="interleaved"),
    Case("RotaryEmbedding", (("n", "m", 16), (1,)), (floats(16, 2),) * 2, {"num_heads": 2, "rotary_embedding_dim": 4},
         dtypes=("float32", "int64"), label="partial"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnxruntime(case: Case) -> None:
    model = case.model()
    assert worst_error(imported(model), model) < 1e-5


REFUSED = [
    (Case("Attention", (WHOLE,), PROJECTIONS, {**SELF, "do_rotary": 1}), "with do_rotary is not imported"),
    (Case("MultiHeadAttention", (("n", "m", 2, 3, 4),), (), HEADS), "packed into one"),
    (Case("FusedGemm", (("n", 8),), (floats(8, 5),), {"activation": "Elu"}), "activation 'Elu'"),
    (Case("GroupQueryAttention", (WHOLE, WHOLE, WHOLE)), "com.microsoft.GroupQueryAttention"),
    (Case("Gelu", domain="com.example"), "com.example.Gelu"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_imported_says_why(case: Case, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        capture(case.model())


def optimized(path: str, folder: Path) -> str:
    """The file that ONNX Runtime writes after its own graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options)
    return str(options.optimized_model_filepath)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"BiasGelu", "FusedMatMul"}),
        ("gpt2", {"FastGelu", "FusedMatMul"}),
        ("llama", {"QuickGelu", "SimplifiedLayerNormalization", "FusedMatMul"}),
        ("vit", {"BiasGelu"}),
        ("resnet", {"FusedConv"}),
        ("conv_net", {"FusedConv"}),
    ],
)
def test_files_that_onnxruntime_optimized(name: str, expected: set[str], tmp_path: Path) -> None:
    path = optimized(exported(name, "torchscript", True, tmp_path), tmp_path)
    assert expected <= {node.op_type for node in onnx.load(path).graph.node}
    program = capture(path)
    assert worst_error(program, path) < 1e-5
    if name in TRANSFORMERS:
        same_operators(program, name)
