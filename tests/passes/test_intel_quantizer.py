"""The form of Intel's quantizer (onnx-neural-compressor): tables of codes, signed activations, a pair behind every
operator, and biases for each channel whose axis is the default, 1, although they have one axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt

WIDTH, ROWS, OUTPUTS = 24, 40, 16


class File:
    """ids [1, 6] -> rows of a table -> Gemm -> Relu -> Gemm, with QuantizeLinear and DequantizeLinear around each."""

    def __init__(self, signed: bool) -> None:
        self.random = np.random.default_rng(3)
        self.dtype = np.int8 if signed else np.uint8
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def weight(self, name: str, value: Any) -> str:
        self.weights[name] = value
        return name

    def node(self, operator: str, *names: str, **attributes: Any) -> str:
        result = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(names), [result], name=result, **attributes))
        return result

    def pair(self, value: str, scale: float, zero: int) -> str:
        label = f"pair_{len(self.nodes)}"
        step = self.weight(f"{label}_scale", np.float32(scale))
        at = self.weight(f"{label}_zero", np.array(zero, self.dtype))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, step, at), step, at)

    def gemm(self, x: str, x_scale: float, inputs: int) -> str:
        label = f"gemm_{len(self.nodes)}"
        steps = self.random.uniform(0.002, 0.01, OUTPUTS).astype(np.float32)
        codes = self.random.integers(-127, 128, (OUTPUTS, inputs)).astype(np.int8)
        scale, zero = self.weight(f"{label}_scale", steps), self.weight(f"{label}_zero", np.zeros(OUTPUTS, np.int8))
        weight = self.node("DequantizeLinear", self.weight(f"{label}_codes", codes), scale, zero, axis=0)
        bias = self.weight(f"{label}_bias", self.random.integers(-500, 500, OUTPUTS).astype(np.int32))
        sums = self.weight(f"{label}_steps", steps * np.float32(x_scale))
        none = self.weight(f"{label}_none", np.zeros(OUTPUTS, np.int32))
        return self.node("Gemm", x, weight, self.node("DequantizeLinear", bias, sums, none), transB=1)

    def model(self) -> onnx.ModelProto:
        table = self.random.integers(-128, 128, (ROWS, WIDTH)).astype(np.int8)
        step, zero = self.weight("table_scale", np.float32(0.0171)), self.weight("table_zero", np.int8(3))
        rows = self.node("Gather", self.node("DequantizeLinear", self.weight("table", table), step, zero), "ids")
        flat = self.node("Reshape", self.pair(rows, 0.0171, 3), self.weight("shape", np.array([-1, WIDTH])))
        hidden = self.pair(self.gemm(self.pair(flat, 0.0171, 3), 0.0171, WIDTH), 0.031, 5)
        active = self.pair(self.node("Relu", hidden), 0.031, 5)
        self.nodes.append(helper.make_node("Identity", [self.pair(self.gemm(active, 0.031, OUTPUTS), 0.05, 2)], ["y"]))
        graph = helper.make_graph(
            self.nodes,
            "intel",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("signed", [True, False])
def test_a_file_in_the_form_of_intels_quantizer(signed: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "intel.onnx")
    onnx.save(File(signed).model(), path)
    program = graphopt.capture(path)
    fused = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}").program
    names = [str(node.target) for node in fused.nodes()]
    assert names.count("graphopt.qlinear.default") == 2 and "aten.linear.default" not in names
    assert "aten.embedding.default" in names
    assert "graphopt.quantize.default" not in names  # rows of codes are read as they are
    # Without its optimizations ONNX Runtime would run the biases as they are written, and refuse their axis.
    theirs, session = onnxruntime.InferenceSession(path), graphopt.compile(fused, threads=1).session()
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, ROWS, (1, 6))
        (ours,), (wanted,) = session.run(None, {"ids": ids}), theirs.run(None, {"ids": ids})
        assert np.abs(ours - wanted).max() <= 0.05 * 1.01
        assert np.mean(ours != wanted) < 0.05
