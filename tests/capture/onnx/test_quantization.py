"""Quantized operators and files against ONNX Runtime: imported, compiled, saved as .pt2 and written as ONNX again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.test_exporters import exported
from tests.capture.onnx.tiny import Array

MICROSOFT = "com.microsoft"
NAMES = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
}  # fmt: skip
_RANDOM = np.random.default_rng(0)


def unsigned(*shape: int) -> Array:
    return _RANDOM.integers(0, 256, shape).astype(np.uint8)


def signed(*shape: int) -> Array:
    return _RANDOM.integers(-128, 128, shape).astype(np.int8)


def biases(*shape: int) -> Array:
    return _RANDOM.integers(-5000, 5000, shape).astype(np.int32)


def floats(*shape: int) -> Array:
    return _RANDOM.normal(size=shape).astype(np.float32)


def scales(*shape: int) -> Array:
    return _RANDOM.uniform(0.01, 0.1, shape).astype(np.float32)


def scale(value: float) -> Array:
    """About this value: codes times round numbers lie on halves, which float32's error moves to either side."""
    return np.array(value * 1.0123457, np.float32)


@dataclass
class Nodes:
    """A graph of single nodes over the same inputs; every result is an output."""

    inputs: dict[str, Array]
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)

    def add(
        self, name: str, *given: Any, dtype: int, domain: str = MICROSOFT, label: str = "", **settings: Any
    ) -> None:
        """`given`: names of inputs, weights, None for what is left out."""
        result = f"{name}{label}_{len(self.nodes)}"
        names = []
        for place, value in enumerate(given):
            names.append("" if value is None else value if isinstance(value, str) else f"{result}_w{place}")
            if isinstance(value, (np.ndarray, np.generic)):
                self.weights[names[-1]] = np.asarray(value)
        self.nodes.append(helper.make_node(name, names, [result], domain=domain, **settings))
        self.outputs.append(helper.make_tensor_value_info(result, dtype, None))

    def model(self) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), ["n", *value.shape[1:]])
            for name, value in self.inputs.items()
        ]
        weights = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "nodes", inputs, self.outputs, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def integer_nodes() -> Nodes:
    """Results that are integers."""
    u, s = TensorProto.UINT8, TensorProto.INT8
    zero, signed_zero = np.array(120, np.uint8), np.array(3, np.int8)
    nodes = Nodes({"image": unsigned(3, 4, 9, 9), "u": unsigned(3, 6, 40), "s": signed(3, 6, 40)})
    for name, codes, at, dtype in (("u", unsigned, zero, u), ("s", signed, signed_zero, s)):
        x = name, scale(0.02), at
        none = np.array(np.iinfo(at.dtype).min, at.dtype)
        add, wide = scale(0.05), scale(0.5)
        for binary in ("QLinearAdd", "QLinearMul"):
            nodes.add(binary, *x, codes(6, 40), scale(0.03), at, add, at, dtype=dtype)
        nodes.add("QLinearConcat", scale(0.04), at, *x, name, scale(0.03), at, dtype=dtype, axis=1)
        nodes.add("QLinearSigmoid", *x, np.float32(1 / 256), none, dtype=dtype)
        nodes.add("QLinearLeakyRelu", *x, scale(0.04), at, dtype=dtype, alpha=0.2)
        nodes.add("QLinearSoftmax", *x, np.float32(1 / 256), none, dtype=dtype, axis=-1, opset=13)
        nodes.add("QLinearMatMul", *x, signed(40, 50), scales(50), signed(50) // 8, wide, at, dtype=dtype, domain="")
        nodes.add("QLinearMatMul", *x, codes(40, 50), scale(0.1), at, wide, at, dtype=dtype, domain="")
        nodes.add("MatMulInteger", name, codes(40, 50), at, codes(50), dtype=TensorProto.INT32, domain="")
    image = "image", scale(0.02), zero
    nodes.add("QLinearGlobalAveragePool", *image, scale(0.01), zero, dtype=u, channels_last=0)
    weight = signed(8, 4, 3, 3), scales(8), np.zeros(8, np.int8)
    nodes.add("QLinearConv", *image, *weight, scale(0.5), zero, biases(8), dtype=u, domain="", pads=[1, 1, 1, 1])
    weight = signed(8, 9, 3, 3), scales(8), np.zeros(8, np.int8)
    nodes.add("QLinearConv", *image, *weight, scale(0.5), zero, biases(8), dtype=u, pads=[1, 1, 1, 1], channels_last=1)
    nodes.add("NhwcMaxPool", "image", dtype=u, kernel_shape=[2, 3], strides=[2, 2], pads=[0, 1, 1, 1])
    nodes.add("MaxPool", "image", dtype=u, domain="", kernel_shape=[2, 3], strides=[2, 2], pads=[0, 1, 1, 1])
    nodes.add("QLinearGlobalAveragePool", *image, np.float32(0.0137), zero, dtype=u, channels_last=1)
    where = np.arange(240).reshape(6, 40) % 3 > 0
    nodes.add(
        "QLinearWhere", where, "u", scale(0.02), zero, unsigned(6, 40), scale(0.03), zero, scale(0.05), zero, dtype=u
    )
    settings: dict[str, Any] = {"dtype": TensorProto.INT32, "domain": "", "strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes.add("ConvInteger", "image", unsigned(8, 4, 3, 3), zero, zero, **settings)
    nodes.add("ConvInteger", "image", signed(8, 2, 3, 3), **settings, group=2)
    return nodes


def float_nodes() -> Nodes:
    """Results that are numbers."""
    f = TensorProto.FLOAT
    zero = np.array(120, np.uint8)
    ids, segments = (np.arange(18, dtype=np.int32).reshape(3, 6) % rows for rows in (50, 2))
    inputs = {"u": unsigned(3, 6, 72), "x": floats(3, 6, 72), "v": floats(3, 6, 64), "flat": unsigned(3, 40)}
    nodes = Nodes({**inputs, "ids": ids, "segments": segments, "counts": np.array([4, 6, 1], np.int32)})
    x = "flat", scale(0.02), np.array(120, np.uint8)
    nodes.add("QGemm", *x, signed(50, 40), scales(50), signed(50) // 8, biases(50), dtype=f, transB=1, alpha=0.5)
    nodes.add("QGemm", *x, signed(40, 50), scale(0.1), np.array(5, np.int8), dtype=f)
    given = "u", signed(72, 50), scale(0.1), scales(50), zero, signed(50) // 8, floats(50)
    nodes.add("MatMulIntegerToFloat", *given, dtype=f)
    nodes.add("DequantizeLinear", "u", scale(0.1), zero, dtype=f)
    nodes.add("DequantizeLinear", "u", scales(6), unsigned(6), dtype=f, axis=1, domain="")
    projection = "u", signed(72, 48), floats(48), scale(0.02), scales(48)
    for counts, causal in ((None, 0), ("counts", 1)):
        rest = counts, zero, np.zeros(48, np.int8)
        nodes.add("QAttention", *projection, *rest, dtype=f, num_heads=2, unidirectional=causal)
    tables = unsigned(50, 16), unsigned(20, 16), unsigned(2, 16), unsigned(16), unsigned(16)
    found = [item for table in tables for item in (scale(0.02), zero)]
    nodes.add("QEmbedLayerNormalization", "ids", "segments", *tables, None, *found[::2], *found[1::2], dtype=f)
    nodes.nodes[-1].output.append("kept")  # which must be there
    for bits, at in ((4, None), (4, unsigned(50, 2)), (8, unsigned(50, 3))):
        table = unsigned(50, 96 * bits // 8), "ids", scales(50, 3), at
        nodes.add("GatherBlockQuantized", *table, dtype=f, bits=bits, block_size=32, quantize_axis=1, gather_axis=0)
    order = np.random.default_rng(5).permutation(np.arange(64) // 32).astype(np.int32)
    grouped = "v", unsigned(40, 2, 16), scales(80), None, order
    nodes.add("MatMulNBits", *grouped, dtype=f, K=64, N=40, bits=4, block_size=32)
    for bits in (2, 4, 8):
        blocks = 3
        width = -(-blocks * bits // 8)
        for zeros in (None, unsigned(40 * width), unsigned(40, width), floats(40 * blocks) + 8):
            if bits == 4 or zeros is None or zeros.dtype == np.uint8:  # ONNX Runtime has floating ones for 4 bits only
                packed = "x", unsigned(40, blocks, 4 * bits), scales(40 * blocks), zeros, None, floats(40)
                nodes.add("MatMulNBits", *packed, dtype=f, K=72, N=40, bits=bits, block_size=32)
    return nodes


def answers(model: onnx.ModelProto | Path, feed: Mapping[str, Array]) -> list[Array]:
    """Of ONNX Runtime, every operator by itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    found: list[Array] = onnxruntime.InferenceSession(source, options).run(None, dict(feed))
    return found


def results(program: Program, feed: Mapping[str, Array]) -> list[Array]:
    return [value.numpy() for value in program(*(torch.from_numpy(feed[spec.name]) for spec in program.inputs))]


def wrong(ours: list[Array], theirs: list[Array], names: list[str]) -> list[str]:
    """Outputs that are not equal: integers exactly, numbers to 1e-5 of the largest."""
    found = []
    for name, a, b in zip(names, ours, theirs, strict=True):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        bound = 0 if a.dtype.kind in "iu" else 1e-5 * np.abs(b).max()
        if a.dtype != b.dtype or a.shape != b.shape or gap > bound:
            found.append(f"{name}: {a.dtype}{a.shape} for {b.dtype}{b.shape}, {gap} apart")
    return found


@pytest.mark.parametrize("make", [integer_nodes, float_nodes])
def test_operators(make: Any) -> None:
    """With the size that the file leaves open, too."""
    nodes = make()
    model, names = nodes.model(), [output.name for output in nodes.outputs]
    program = capture(model)
    for rows in (3, 1):
        feed = {name: value[:rows] for name, value in nodes.inputs.items()}
        assert not wrong(results(program, feed), answers(model, feed), names)


@pytest.mark.slow
@pytest.mark.parametrize("make", [integer_nodes, float_nodes])
def test_operators_compiled_and_written(make: Any, tmp_path: Path) -> None:
    nodes = make()
    program, names = capture(nodes.model()), [output.name for output in nodes.outputs]
    wanted = results(program, nodes.inputs)
    program.save(str(tmp_path / "m.pt2"))
    assert not wrong(results(capture(tmp_path / "m.pt2"), nodes.inputs), wanted, names)
    session = graphopt.compile(program, "cpu").session()
    assert not wrong(session.run(None, nodes.inputs), wanted, names)


def test_every_sum_of_integers_is_exact() -> None:
    """Long sums of the largest codes, with weights that are known and that are not."""
    for known in (True, False):
        left, right = np.full((3, 3000), 255, np.uint8), np.full((3000, 2), 255, np.uint8)
        right[::2] -= 1
        nodes = Nodes({"codes": left if known else right[None]})
        given = ("codes", right) if known else (left, "codes")
        nodes.add("MatMulInteger", *given, dtype=TensorProto.INT32, domain="")
        (found,) = results(capture(nodes.model()), nodes.inputs)
        assert np.array_equal(found, (left.astype(np.int64) @ right).reshape(found.shape))


def test_small_weights_are_multiplied_in_float32() -> None:
    """What their own values prove exact, not only their types and number."""
    nodes = Nodes({"u": unsigned(3, 700)})
    nodes.add("MatMulInteger", "u", signed(700, 8) // 4, dtype=TensorProto.INT32, domain="")
    nodes.add("MatMulInteger", "u", np.full((700, 8), 127, np.int8), dtype=TensorProto.INT32, domain="")
    program = capture(nodes.model())
    types = [node.meta["val"].dtype for node in program.nodes() if node.target is torch.ops.aten.linear.default]
    assert types == [torch.float32, torch.float64]
    assert not wrong(results(program, nodes.inputs), answers(nodes.model(), nodes.inputs), ["small", "large"])


def test_average_pooling_differs_at_ties_alone() -> None:
    """ONNX Runtime multiplies by a rounded 1 / (9 * scale), this divides: halves fall to either side."""
    zero = np.array(120, np.uint8)
    nodes = Nodes({"image": unsigned(3, 4, 9, 9)})
    given = "image", np.float32(0.05), zero, np.float32(0.03), zero
    nodes.add("QLinearAveragePool", *given, dtype=TensorProto.UINT8, kernel_shape=[3, 3], strides=[2, 2])
    (ours,), (theirs,) = results(capture(nodes.model()), nodes.inputs), answers(nodes.model(), nodes.inputs)
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    assert apart.max() <= 1 and apart.mean() < 0.05


def four_bit_model(reader: str = "DequantizeLinear") -> onnx.ModelProto:
    """x [n, 7] times a blocked int4 weight [7, 5] with uint4 and int4 zero points in turn."""
    codes = _RANDOM.integers(-8, 8, 35)
    weights = [
        helper.make_tensor("codes", TensorProto.INT4, [7, 5], codes),
        helper.make_tensor("more", TensorProto.UINT4, [7, 5], codes + 8),
        helper.make_tensor("zero", TensorProto.UINT4, [2, 5], _RANDOM.integers(0, 16, 10)),
        numpy_helper.from_array(scales(2, 5), "scale"),
    ]
    settings: dict[str, Any] = {"axis": 0, "block_size": 4} if reader == "DequantizeLinear" else {}
    nodes = [
        helper.make_node(reader, ["codes", "scale"][: 1 + bool(settings)], ["a"], **settings),
        helper.make_node("DequantizeLinear", ["more", "scale", "zero"], ["b"], axis=0, block_size=4),
        helper.make_node("MatMul", ["x", "a"], ["first"]),
        helper.make_node("MatMul", ["x", "b"], ["second"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("first", "second")], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_four_bits() -> None:
    model, feed = four_bit_model(), {"x": floats(3, 7)}
    program = capture(model)
    assert not wrong(results(program, feed), answers(model, feed), ["int4", "uint4"])
    bounds = [n.kwargs["qmax"] for n in program.nodes() if n.target is torch.ops.graphopt.dequantize.default]
    assert bounds == [7, 15]
    with pytest.raises(CaptureError, match="MatMul of int4 is not imported; cast or dequantize"):
        capture(four_bit_model("Identity"))


def test_refusals() -> None:
    nodes = Nodes({"x": floats(3, 6, 32)})
    given = "x", unsigned(40, 2, 8), scales(80), None, np.arange(32, dtype=np.int32) // 20
    nodes.add("MatMulNBits", *given, dtype=TensorProto.FLOAT, K=32, N=40, bits=4, block_size=16)
    with pytest.raises(CaptureError, match="g_idx is only imported with 4 bits, without zero points"):
        capture(nodes.model())
    nodes = Nodes({"x": floats(3, 6, 32)})
    nodes.add("DynamicQuantizeLSTM", "x", dtype=TensorProto.FLOAT)
    with pytest.raises(CaptureError, match="DynamicQuantizeLSTM"):
        capture(nodes.model())


def sample_feeds(name: str) -> list[dict[str, Array]]:
    random = np.random.default_rng(1)
    if name == "conv_net":
        return [{"image": random.normal(size=(2, 3, 12, 12)).astype(np.float32)} for _ in range(4)]
    mask = np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    return [{"input_ids": random.integers(0, 100, (2, 6)), "attention_mask": mask} for _ in range(4)]


def quantized_file(name: str, how: str, folder: Path) -> Path:
    """What ONNX Runtime's tools make of a small model."""
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Samples(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(sample_feeds(name))

        def get_next(self) -> Any:
            return next(self.feeds, None)

    source = exported(name, "torchscript" if name == "bert" else "dynamo", True, folder)
    path = folder / f"{name}-{how}.onnx"
    if how == "dynamic":
        tools.quantize_dynamic(source, path)
    elif how == "MatMulNBits":
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=False)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
    else:
        types = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of ranges that are empty
            samples, settings = Samples(), {"quant_format": tools.QuantFormat[how], "per_channel": True, **types}
            tools.quantize_static(source, path, samples, **settings)
    return path


FILES = {
    ("conv_net", "QDQ"): 5,
    ("conv_net", "QOperator"): 5,
    ("conv_net", "dynamic"): 3,
    ("bert", "QDQ"): 80,
    ("bert", "QOperator"): 60,
    ("bert", "dynamic"): 8,
    ("bert", "MatMulNBits"): 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), FILES)
def test_files(name: str, how: str, tmp_path: Path) -> None:
    path = quantized_file(name, how, tmp_path)
    program = capture(path)
    found = Counter(node.target for node in program.nodes())
    quantized = found[torch.ops.graphopt.quantize.default] + found[torch.ops.graphopt.dynamic_quantize.default]
    assert quantized >= FILES[name, how]
    assert found[torch.ops.graphopt.dequantize.default] > 0
    program.to_onnx(str(tmp_path / "again.onnx"))
    onnx.checker.check_model(str(tmp_path / "again.onnx"), full_check=True)
    compiled = (name, how) in (("conv_net", "QDQ"), ("conv_net", "dynamic"), ("bert", "MatMulNBits"))
    session = graphopt.compile(program, "cpu").session() if compiled else None
    for feed in sample_feeds(name)[:2]:
        wanted = answers(path, feed)
        assert not wrong(results(program, feed), wanted, ["eager"])
        assert not wrong(answers(tmp_path / "again.onnx", feed), wanted, ["written again"])
        if session is not None:
            assert not wrong(session.run(None, feed), wanted, ["compiled"])


@pytest.mark.slow
def test_compiled_integer_convolutions_are_exact() -> None:
    """At a size where float convolutions go through minimal filtering, which rounds."""
    nodes = Nodes({"image": unsigned(1, 64, 20, 20)})
    zero = np.array(120, np.uint8)
    weight = signed(64, 64, 3, 3) // 4
    nodes.add("ConvInteger", "image", weight, zero, dtype=TensorProto.INT32, domain="", pads=[1, 1, 1, 1])
    program = capture(nodes.model())
    session = graphopt.compile(program, "cpu").session()
    wanted = answers(nodes.model(), nodes.inputs)
    assert not wrong(results(program, nodes.inputs), wanted, ["eager"])
    assert not wrong(session.run(None, nodes.inputs), wanted, ["compiled"])
