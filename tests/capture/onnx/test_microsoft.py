"""The operators that ONNX Runtime's optimizers write, one by one and in whole files, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from graphopt.capture import capture
from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.errors import CaptureError
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
        gap = [""] * (self.attributes.get("_bias_at", first) - first)
        names = [*names[:first], *gap, *names[len(self.inputs) :], *names[first : len(self.inputs)]]
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
    Case("Attention", (WHOLE, ("2 * n",)), PROJECTIONS, SELF, dtypes=("float32", "int32"), label="ends and starts"),
    Case("RotaryEmbedding", (("n", 2, "m", 8), ("n", "m")), (floats(16, 4),) * 2, dtypes=("float32", "int64")),
    Case("RotaryEmbedding", (("n", "m", 16), ("n", "m")), (floats(16, 4), floats(16, 4)[::-1]),
         {"interleaved": 1}, dtypes=("float32", "int64"), label="interleaved"),
    Case("RotaryEmbedding", (("n", "m", 24), ("n", "m")), (floats(16, 4), floats(16, 4)[::-1]),
         {"num_heads": 2, "rotary_embedding_dim": 8}, dtypes=("float32", "int64"), label="part"),
    Case("RotaryEmbedding", (("n", 2, "m", 12), (1,)), (floats(64, 4), floats(64, 4)[::-1]),
         {"num_heads": 2, "rotary_embedding_dim": 8, "interleaved": 1}, dtypes=("float32", "int64"), label="first"),
    Case("TransposeMatMul", (WHOLE, ("n", "k", 8)), attributes={"transB": 1}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnxruntime(case: Case) -> None:
    model = case.model()
    assert worst_error(imported(model), model) < 1e-5


REFUSED = [
    (Case("Attention", (WHOLE,), PROJECTIONS, {**SELF, "do_rotary": 1}), "with do_rotary is not imported"),
    (Case("MultiHeadAttention", (WHOLE,), (), HEADS), "packed inputs with 5 axes, not 3"),
    (Case("MultiHeadAttention", (WHOLE,) * 3, (), HEADS, ("r", "", "", "scores")), "scores as an output"),
    (Case("Attention", (WHOLE, (11,)), PROJECTIONS, SELF, dtypes=("float32", "int32")), "mask of 11 numbers"),
    (Case("RotaryEmbedding", (WHOLE, ("n", "m")), (floats(16, 4),) * 2, {"scale": 0.5}, dtypes=("float32", "int64")),
     "a scale is not imported"),
    (Case("DecoderMaskedMultiHeadAttention", (WHOLE,) * 3, (), HEADS),
     r"DecoderMaskedMultiHeadAttention \(r\); take the model from before"),
    (Case("Conv", (("n", 4, 6, 6),), (floats(8, 4, 3, 3),), domain="com.microsoft.nchwc"),
     r"nchwc.Conv \(r\); .*save it with ORT_ENABLE_EXTENDED"),
    (Case("FusedGemm", (("n", 8),), (floats(8, 5),), {"activation": "Elu"}), "activation 'Elu'"),
    (Case("Gelu", domain="com.example"), "com.example.Gelu"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_imported_says_why(case: Case, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        capture(case.model())


def test_packed_heads() -> None:
    """ONNX Runtime has them on other processors only: as from the parts apart."""
    random = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 5, 2, 3, 4, generator=random)
    apart = [packed[:, :, :, place].reshape(2, 5, 8) for place in range(3)]
    wanted = capture(Case("MultiHeadAttention", (WHOLE,) * 3, (floats(24),), HEADS).model())(*apart)[0]
    whole = Case("MultiHeadAttention", (("n", "m", 2, 3, 4),), (floats(24),), {**HEADS, "_bias_at": 3})
    torch.testing.assert_close(capture(whole.model())(packed)[0], wanted)
    two = Case("MultiHeadAttention", (WHOLE, ("n", "t", 2, 2, 4)), (floats(24),), {**HEADS, "_bias_at": 3})
    torch.testing.assert_close(capture(two.model())(apart[0], packed[:, :, :, 1:])[0], wanted)


def test_half_precision() -> None:
    """Masks have the type of the scores; ONNX Runtime has none of these on this processor."""
    for case in (
        Case("Attention", (WHOLE, ("n", "m")), PROJECTIONS, {**SELF, "unidirectional": 1}, dtypes=("float32", "int32")),
        Case("GroupQueryAttention", (WHOLE, WHOLE, WHOLE, None, None, ("n",), ()), (),
             {**HEADS, "kv_num_heads": 2, "smooth_softmax": 1}, dtypes=("float32",) * 5 + ("int32",) * 2),
    ):  # fmt: skip
        single = case.model()
        half = halved(single)
        values = draw_inputs(capture(single), {"n": 2, "m": 5}, 0)
        wanted = capture(single)(*values)[0]
        ours = capture(half)(*(value.half() if value.is_floating_point() else value for value in values))[0]
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours.float(), wanted, rtol=1e-2, atol=1e-2)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with float16 in place of float32."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in half.graph.initializer:
        held = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(held, tensor.name))
    return half


NORMS: dict[str, Any] = {"groups": 2, "epsilon": 1e-3, "activation": 1}
IMAGE = ("n", 4, 5, 6)


def group_norm(x: torch.Tensor) -> torch.Tensor:
    weight, bias = torch.from_numpy(floats(6)), torch.from_numpy(floats(6)) + 1
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x.movedim(-1, 1), 2, weight, bias, 1e-3)).movedim(
        1, -1
    )


def convolution(x: torch.Tensor) -> torch.Tensor:
    weight = torch.from_numpy(floats(4, 6, 3, 3))
    return torch.nn.functional.conv2d(x.movedim(-1, 1), weight, torch.from_numpy(floats(4)), padding=1).movedim(1, -1)


CONV: dict[str, Any] = {"pads": [1, 1, 1, 1]}
ELSEWHERE = [
    (Case("GroupNorm", (IMAGE,), (floats(6), floats(6) + 1), NORMS), group_norm),
    (Case("SkipGroupNorm", (IMAGE, ("n", 6)), (floats(6), floats(6) + 1), {**NORMS, "_weights_after": 1}),
     lambda x, y: group_norm(x + y[:, None, None])),
    (Case("NhwcConv", (IMAGE,), (floats(4, 6, 3, 3), floats(4)), CONV), convolution),
    (Case("NhwcFusedConv", (IMAGE,), (floats(4, 6, 3, 3), floats(4)), {**CONV, "activation": "Relu"}),
     lambda x: torch.relu(convolution(x))),
    (Case("BiasSplitGelu", weights=(floats(8),)), lambda x: (total := x + torch.from_numpy(floats(8)))[..., :4]
     * torch.nn.functional.gelu(total[..., 4:])),
    (Case("BiasAdd", (WHOLE, WHOLE), (floats(8),), {"_weights_after": 1}),
     lambda x, y: x + torch.from_numpy(floats(8)) + y),
    (Case("GemmFastGelu", weights=(floats(8, 5), floats(5))), lambda x: torch.nn.functional.gelu(
        x @ torch.from_numpy(floats(8, 5)) + torch.from_numpy(floats(5)), approximate="tanh")),
]  # fmt: skip


@pytest.mark.parametrize(("case", "wanted"), ELSEWHERE, ids=[str(case) for case, _ in ELSEWHERE])
def test_operators_that_onnxruntime_has_on_other_processors(case: Case, wanted: Any) -> None:
    program = capture(case.model())
    for sizes in check_sizes(program):
        values = draw_inputs(program, sizes, 0)
        torch.testing.assert_close(program(*values)[0], wanted(*values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_relative_position_bias(both: bool) -> None:
    """As T5 of transformers has it; the table lies in the file column after column."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=8, d_kv=4, num_heads=2, num_layers=1, is_decoder=not both)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    table = layer.relative_attention_bias.weight.detach().numpy()
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["length"]),
        helper.make_node("RelativePositionBias", ["table", "length", "length"], ["r"], domain=DOMAIN,
                         max_distance=128, is_bidirectional=int(both)),
    ]  # fmt: skip
    held = {"table": np.ascontiguousarray(table.T).reshape(table.shape), "one": np.array(1, np.int64)}
    model = model_of(nodes, {"x": ("float32", TOKENS)}, ["r"], held)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    program = capture(model)
    for length in (2, 7, 150):
        torch.testing.assert_close(program(torch.zeros(1, length))[0], layer.compute_bias(length, length))
