"""Every family of operators against ONNX Runtime, with sizes fixed and dynamic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from graphopt.capture.onnx.values import rounded
from tests.capture.onnx.tiny import Array, imported, model_of, worst_error


@dataclass(frozen=True)
class Case:
    """One node on inputs x, y, ... of these shapes, then weights a, b, ...; a name as a size is a dynamic one."""

    name: str
    shapes: tuple[tuple[int | str, ...], ...] = (("n", 4),)
    weights: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    opset: int = 20
    label: str = ""
    outputs: int = 1

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name


def _floats(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


IMAGE: tuple[tuple[int | str, ...], ...] = (("n", 4, 6, 8),)
UNARY = (
    "Abs", "Neg", "Exp", "Erf", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Floor", "Ceil", "Round", "Sign",
    "Reciprocal", "Relu", "Sigmoid", "Tanh", "HardSwish", "Mish", "Softplus", "Softsign", "Gelu", "LeakyRelu", "Elu",
    "Selu", "Celu", "HardSigmoid", "ThresholdedRelu", "IsNaN", "IsInf", "Identity", "LogSoftmax", "Softmax", "Size",
    "Shape", "Flatten", "Dropout", "Sqrt", "Log", "Transpose",
)  # fmt: skip
BINARY = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Min",
    "Max",
    "Equal",
    "Less",
    "Greater",
    "LessOrEqual",
    "GreaterOrEqual",
    "Sum",
    "Mean",
)
REDUCTIONS = ("ReduceSum", "ReduceProd", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
              "ReduceSumSquare", "ReduceLogSumExp")  # fmt: skip

CASES = [
    *(Case(name) for name in UNARY),
    *(Case(name, (("n", 4), ("n", 4))) for name in BINARY),
    *(Case(name, (("n", 4), (4,)), label="broadcast") for name in BINARY),
    *(Case(name, weights=(np.float32(0.5),), label="number") for name in BINARY),
    *(Case(name, (("n", 4), ("n", 4)), dtypes=("bool", "bool")) for name in ("And", "Or", "Xor")),
    *(Case(name, (("n", 3, 4),), (_ints(1),), {"keepdims": 0}) for name in REDUCTIONS if name != "ReduceProd"),
    *(Case(name, (("n", 3, 4),), label="all") for name in REDUCTIONS),
    *(Case(name, (("n", 3, 4),), (), {"axes": [-1]}, opset=12, label="12") for name in REDUCTIONS if "Log" not in name),
    Case("Div", weights=(_ints(-3),), dtypes=("int64",), label="truncates"),
    Case("Mod", weights=(_ints(-3),), dtypes=("int64",)),
    Case("Mod", weights=(np.float32(-0.3),), attributes={"fmod": 1}, label="float"),
    Case("Not", dtypes=("bool",)),
    Case("Pow", weights=(np.float32(2),)),
    Case("Pow", weights=(np.float32(3),), label="cube"),
    Case("Pow", weights=(_ints(2),), label="integer"),
    Case("PRelu", weights=(_floats(4),)),
    Case("Clip", weights=(np.float32(-0.5), np.float32(0.5))),
    Case("Clip", weights=(np.float32(0), np.float32(6)), label="relu6"),
    Case("Clip", weights=(None, np.float32(0.5)), label="above"),
    Case("Where", (("n", 4), ("n", 4), ("n", 4)), dtypes=("bool", "float32", "float32")),
    Case("Where", (("n", 4), (4,), ("n", 1)), dtypes=("bool", "float32", "float32"), label="broadcast"),
    Case("Cast", attributes={"to": TensorProto.INT64}),
    Case("Cast", attributes={"to": TensorProto.BOOL}, label="bool"),
    Case("IsInf", attributes={"detect_negative": 0}, label="positive"),
    Case("Gelu", attributes={"approximate": "tanh"}, label="tanh"),
    Case("Softmax", (("n", 3, 4),), attributes={"axis": 1}, label="middle"),
    Case("Softmax", (("n", 3, 4),), opset=12, label="flattened"),
    Case("MatMul", (("n", 3, 4),), (_floats(4, 5),)),
    Case("MatMul", (("n", 2, "m", 4), ("n", 2, 4, "m")), label="batched"),
    Case("Gemm", weights=(_floats(4, 5), _floats(5))),
    Case("Gemm", weights=(_floats(5, 4), _floats(5)), attributes={"transB": 1}, label="linear"),
    Case("Gemm", ((4, "n"),), (_floats(4, 5), _floats(5)), {"transA": 1, "alpha": 0.5, "beta": 2.0}, label="scaled"),
    Case("Einsum", (("n", 3, 4), ("n", 5, 4)), attributes={"equation": "bij, bkj -> bik"}),
    Case("LayerNormalization", weights=(_floats(4), _floats(4)), attributes={"epsilon": 1e-12}),
    Case("LayerNormalization", (("n", 3, 4),), (_floats(3, 4),), {"axis": 1}, label="two axes"),
    Case("BatchNormalization", IMAGE, (_floats(4), _floats(4), _floats(4), np.abs(_floats(4)))),
    Case("InstanceNormalization", IMAGE, (_floats(4), _floats(4))),
    Case("GroupNormalization", IMAGE, (_floats(4), _floats(4)), {"num_groups": 2}, opset=21),
    Case("LpNormalization"),
    Case("Conv", IMAGE, (_floats(5, 4, 3, 3), _floats(5)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("Conv", IMAGE, (_floats(4, 1, 3, 3),), {"group": 4, "dilations": [2, 1]}, label="depthwise"),
    Case("Conv", IMAGE, (_floats(5, 4, 3, 3),), {"pads": [0, 0, 1, 1], "strides": [2, 2]}, label="one-sided"),
    Case("Conv", IMAGE, (_floats(5, 4, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, label="same"),
    Case("Conv", (("n", 4, "m"),), (_floats(5, 4, 3),), {"pads": [1, 1]}, label="1d"),
    Case("ConvTranspose", IMAGE, (_floats(4, 5, 3, 3),), {"strides": [2, 2], "output_padding": [1, 1]}),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, label="one-sided"),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, label="c"),
    Case("GlobalAveragePool", IMAGE),
    Case("GlobalMaxPool", IMAGE),
    Case("Reshape", (("n", 3, 4),), (_ints(0, -1),)),
    Case("Transpose", (("n", 3, "m", 4),), (), {"perm": [0, 2, 1, 3]}, label="heads"),
    Case("Flatten", (("n", 3, 4),), (), {"axis": -1}, label="last"),
    Case("Squeeze", (("n", 1, 4),), (_ints(1),)),
    Case("Squeeze", (("n", 1, 4),), (), {"axes": [1]}, opset=11, label="11"),
    Case("Unsqueeze", weights=(_ints(0, -1),)),
    Case("Unsqueeze", attributes={"axes": [1]}, opset=12, label="12"),
    Case("Concat", (("n", 4), ("m", 4)), attributes={"axis": 0}),
    Case("Slice", weights=(_ints(1), _ints(2**62), _ints(1), _ints(2))),
    Case("Slice", weights=(_ints(-1), _ints(-(2**62)), _ints(0), _ints(-1)), label="reversed"),
    Case("Slice", weights=(_ints(3), _ints(0), _ints(1), _ints(-2)), label="backwards"),
    Case("Slice", weights=(_ints(1, 0), _ints(-1, 3)), label="no axes"),
    Case("Expand", (("n", 1),), (_ints(3, 1, 4),)),
    Case("Tile", weights=(_ints(2, 3),)),
    Case("Pad", weights=(_ints(0, 1, 2, 0), np.float32(7))),
    Case("Pad", IMAGE, (_ints(0, 0, 1, 2, 0, 0, 0, 1),), {"mode": "reflect"}, label="reflect"),
    Case("Trilu", (("n", "n"),), (_ints(1),), label="upper"),
    Case("Trilu", (("n", "n"),), (), {"upper": 0}, label="lower"),
    Case("EyeLike", (("n", "n"),), (), {"k": 1}),
    Case("DepthToSpace", IMAGE, (), {"blocksize": 2}),
    Case("DepthToSpace", IMAGE, (), {"blocksize": 2, "mode": "CRD"}, label="CRD"),
    Case("SpaceToDepth", IMAGE, (), {"blocksize": 2}),
    Case("Gather", weights=(_ints(0, -1),), attributes={"axis": 1}),
    Case("Gather", weights=(np.int64(-1),), attributes={"axis": 1}, label="one"),
    Case("GatherND", (("n", 3, 4),), (np.array([[0, 1], [0, 2]]),)),
    Case("GatherElements", (("n", 4),), (np.array([[0, -1, 2]]),), {"axis": 1}),
    Case("ScatterElements", ((2, 4),), (np.array([[0, -1]]), _floats(1, 2)), {"axis": 1}),
    Case("ScatterND", (("n", 4),), (np.array([[0]]), _floats(1, 4))),
    Case("ArgMax", attributes={"axis": 1}),
    Case("ArgMin", attributes={"axis": 1, "keepdims": 0}),
    Case("CumSum", weights=(np.int64(0),)),
    Case("CumSum", weights=(np.int64(1),), attributes={"reverse": 1, "exclusive": 1}, label="reverse"),
    Case("OneHot", weights=(np.int64(3), _floats(2)), dtypes=("int64",)),
    Case("Resize", IMAGE, (None, np.array([1, 1, 2, 2], dtype=np.float32)),
         {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Case("Resize", IMAGE, (None, np.array([1, 1, 2, 2], dtype=np.float32)), {"mode": "linear"}, label="linear"),
    Case("Resize", IMAGE, (None, np.array([1, 1, 2, 2], dtype=np.float32)), {"mode": "cubic"}, label="cubic"),
]  # fmt: skip


def model_for(case: Case, fixed: bool) -> Any:
    sizes = {"n": 5, "m": 3}
    shapes = [[sizes.get(str(s), s) for s in shape] if fixed else shape for shape in case.shapes]
    dtypes = [*case.dtypes, *["float32"] * len(shapes)]
    inputs = {name: (dtype, shape) for name, dtype, shape in zip("xyz", dtypes, shapes, strict=False)}
    weights = {name: value for name, value in zip("abcd", case.weights, strict=False) if value is not None}
    names = [name if value is not None else "" for name, value in zip("abcd", case.weights, strict=False)]
    results = ["r", "s", "t"][: case.outputs]
    node = helper.make_node(case.name, [*inputs, *names], results, **case.attributes)
    return model_of([node], inputs, results, weights, case.opset)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnxruntime(case: Case, fixed: bool) -> None:
    model = model_for(case, fixed)
    assert worst_error(imported(model), model) < 1e-5


def test_the_lowest_number_stays_finite() -> None:
    lowest = float(np.finfo(np.float32).min)
    assert rounded(lowest, torch.float32) == lowest
    assert rounded(9.999999960041972e-13, torch.float32) == 1e-12
    assert rounded(1e39, torch.float32) == np.inf
