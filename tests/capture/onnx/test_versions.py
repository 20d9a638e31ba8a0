"""What operators meant in older opsets, and modes that ONNX's own cases leave out, against ONNX Runtime."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.test_operators import Case, model_for
from tests.capture.onnx.tiny import Array, imported, model_of, worst_error

IMAGE: tuple[tuple[int | str, ...], ...] = ((1, 2, 5, 7),)
SEQUENCE: tuple[tuple[int | str, ...], ...] = ((2, 3, 4),)
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def _ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def _scales(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def _floats(*shape: int) -> Array:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def _resize(mode: str, opset: int, label: str, target: tuple[Any, ...], **settings: Any) -> Case:
    return Case("Resize", IMAGE, target, {"mode": mode, **settings}, opset=opset, label=f"{opset}-{mode}-{label}")


TO_SIZES = (_scales(), _scales(), _ints(1, 2, 8, 4))
STATISTICS = (_floats(2), _floats(2), _floats(2), np.abs(_floats(2)))

CASES = [
    Case("Clip", SEQUENCE, attributes={"min": -0.5, "max": 0.5}, opset=7),
    Case("Clip", SEQUENCE, attributes={"max": 0.5}, opset=10, label="above"),
    *(Case(name, SEQUENCE, opset=opset, label=str(opset))
      for name in ("Softmax", "LogSoftmax", "Hardmax") for opset in (7, 11, 13)),
    Case("Softmax", SEQUENCE, attributes={"axis": 0}, opset=12, label="all axes"),
    Case("Slice", SEQUENCE, attributes={"starts": [1, -2], "ends": [3, 100], "axes": [1, 2]}, opset=9),
    Case("Slice", SEQUENCE, attributes={"starts": [0, 1], "ends": [2, 2]}, opset=7, label="no axes"),
    *(Case("Pad", IMAGE, attributes={"mode": mode, "pads": [0, 0, 1, 2, 0, 0, 2, 1]}, opset=10, label=mode)
      for mode in ("constant", "reflect", "edge")),
    Case("Pad", SEQUENCE, attributes={"pads": [0, 1, 0, 0, 0, 2], "value": 7.0}, opset=7, label="value"),
    Case("TopK", SEQUENCE, attributes={"k": 2, "axis": 1}, opset=7, outputs=2),
    Case("TopK", SEQUENCE, (_ints(2),), {"axis": -1}, opset=10, label="10", outputs=2),
    Case("TopK", SEQUENCE, (_ints(3),), {"axis": 1, "largest": 0}, opset=11, label="11", outputs=2),
    Case("Upsample", IMAGE, attributes={"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7),
    Case("Upsample", IMAGE, (_scales(1, 1, 2, 2),), {"mode": "linear"}, opset=9, label="9"),
    *(Case("Resize", IMAGE, (_scales(1, 1, *scales),), {"mode": mode}, opset=10, label=f"10-{mode}-{scales}")
      for mode in ("nearest", "linear") for scales in ((2, 2), (0.6, 0.5))),
    *(_resize("nearest", 13, f"{where}-{how}", TO_SIZES, coordinate_transformation_mode=where, nearest_mode=how)
      for where, how in product(COORDINATES, ROUNDINGS)),
    *(_resize(mode, opset, where, TO_SIZES, coordinate_transformation_mode=where)
      for mode in ("linear", "cubic") for where in COORDINATES for opset in (11, 19)),
    _resize("nearest", 11, "tf", TO_SIZES, coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="floor"),
    _resize("cubic", 13, "excludes", TO_SIZES, exclude_outside=1, cubic_coeff_a=-0.5),
    _resize("linear", 18, "antialias", TO_SIZES, antialias=1),
    _resize("cubic", 18, "antialias", TO_SIZES, antialias=1, cubic_coeff_a=-0.5),
    _resize("linear", 13, "crop", (_scales(0, 0, 0.2, 0.1, 1, 1, 0.9, 1.3), None, _ints(1, 2, 4, 6)),
            coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=5.0),
    *(Case("BatchNormalization", IMAGE, STATISTICS, opset=opset, label=str(opset)) for opset in (7, 9, 14, 15)),
    Case("BatchNormalization", IMAGE, STATISTICS, {"training_mode": 1}, opset=15, label="training", outputs=3),
    Case("GroupNormalization", IMAGE, (_floats(2), _floats(2)), {"num_groups": 2}, opset=18, label="18"),
    Case("Dropout", SEQUENCE, attributes={"ratio": 0.3}, opset=7),
    Case("Scatter", SEQUENCE, (np.array([[[0, -1]]]), _floats(1, 1, 2)), {"axis": 2}, opset=10),
    *(Case(name, IMAGE, attributes={"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1], "ceil_mode": 1},
           opset=22, label="ceil") for name in ("MaxPool", "AveragePool")),
    Case("AveragePool", IMAGE, attributes={"kernel_shape": [2, 3], "dilations": [2, 2], "pads": [1, 1, 1, 1]}, opset=19,
         label="dilated"),
    Case("AveragePool", IMAGE, attributes={"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}, opset=11, label="one side"),
    Case("LpPool", IMAGE, attributes={"kernel_shape": [2, 2], "p": 3, "pads": [1, 0, 0, 1]}, opset=11),
    Case("LRN", IMAGE, attributes={"size": 3, "alpha": 0.1, "bias": 2.0}, opset=13),
    *(Case("ConvTranspose", IMAGE, (_floats(2, 3, 3, 3),), {"strides": [2, 2], **how}, label=next(iter(how)))
      for how in ({"pads": [1, 0, 0, 1]}, {"auto_pad": "SAME_UPPER"}, {"output_shape": [11, 14]})),
    Case("CumSum", SEQUENCE, (np.int64(1),), {"exclusive": 1}, label="exclusive"),
    *(Case("ScatterND", SEQUENCE, (np.array([[0, -1], [0, 2], [1, 0]]), _floats(3, 4)), {"reduction": how}, opset=18,
           label=how) for how in ("add", "mul", "max", "min")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnxruntime(case: Case) -> None:
    model = model_for(case, fixed=True)
    assert worst_error(imported(model), model) < 2e-5


def test_equal_elements_keep_their_order() -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "r"], largest=1)
    program = imported(model_of([node], {"x": ("float32", [6])}, ["v", "r"], {"k": _ints(4)}))
    values, places = program(torch.tensor([1.0, 3, 3, 0, 3, 1]))
    assert (values.tolist(), places.tolist()) == ([3, 3, 3, 1], [1, 2, 4, 0])


def test_uint64_is_divided_without_its_sign() -> None:
    left = np.array([2**64 - 1, 2**63, 2**63 + 5, 7, 2**64 - 1, 0], dtype=np.uint64)
    right = np.array([3, 2**63 - 1, 2**64 - 1, 2, 2**64 - 1, 9], dtype=np.uint64)
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT64, [6]) for name in "ab"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UINT64, [6]) for name in ("q", "m", "s")]
    nodes = [
        helper.make_node("Div", ["a", "b"], ["q"]),
        helper.make_node("Mod", ["a", "b"], ["m"]),
        helper.make_node("BitShift", ["a", "m"], ["s"], direction="RIGHT"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    quotient, rest, shifted = (
        value.numpy() for value in capture(model)(torch.from_numpy(left), torch.from_numpy(right))
    )
    np.testing.assert_array_equal(quotient, left // right)
    np.testing.assert_array_equal(rest, left % right)
    wanted = [int(a) >> int(b) if b < 64 else 0 for a, b in zip(left, left % right, strict=True)]
    assert shifted.tolist() == wanted


def test_floats_of_eight_bits_end_at_their_largest_number() -> None:
    x = torch.tensor([1e6, 464.0, 465.0, -float("inf"), float("nan"), 0.3])
    for saturate, wanted in (
        (1, [448.0, 448, 448, -448, np.nan, 0.3125]),
        (0, [np.nan, 448, np.nan, np.nan, np.nan, 0.3125]),
    ):
        node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN, saturate=saturate)
        (result,) = imported(model_of([node], {"x": ("float32", [6])}, ["y"], opset=23))(x)
        np.testing.assert_array_equal(result.float().numpy(), np.array(wanted, np.float32))


@pytest.mark.parametrize(("node", "words"), [
    (helper.make_node("NonMaxSuppression", ["x", "x"], ["y"]), "depends on values at run time"),
    (helper.make_node("RandomNormalLike", ["x"], ["y"]), "operators that graphopt does not import: RandomNormalLike"),
    (helper.make_node("Bernoulli", ["x"], ["y"]), "RandomUniformLike is not imported"),
    (helper.make_node("RoiAlign", ["x", "x", "i"], ["y"]), "sampling_ratio over 0"),
])  # fmt: skip
def test_what_is_refused(node: Any, words: str) -> None:
    model = model_of([node], {"x": ("float32", [2, 3, 4])}, ["y"], {"i": _ints(0)})
    with pytest.raises(CaptureError, match=words):
        capture(model)
