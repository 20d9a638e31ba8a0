"""Sequences inside a model, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.tiny import imported, model_of, worst_error

X = {"x": ("float32", [3, 4])}
WEIGHTS = {"one": np.array(1), "last": np.array(-1), "two": np.array(2), "parts": np.array([1, 2])}


def node(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(name, inputs, outputs, **attributes)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [("", {}), ("", {"keepdims": 0}), ("", {"axis": 1}), ("two", {}), ("two", {"axis": 1}), ("parts", {})],
)
def test_parts_are_split_and_joined(sizes: str, settings: dict[str, int]) -> None:
    inputs = ["x", *([sizes] if sizes else [])]
    nodes = [
        node("SplitToSequence", inputs, ["s"], **settings),
        node("SequenceAt", ["s", "last"], ["a"]),
        node("SequenceErase", ["s"], ["t"]),
        node("SequenceInsert", ["t", "a", "one"], ["u"]),
        node("ConcatFromSequence", ["u"], ["y"], axis=0),
        node("SequenceLength", ["u"], ["n"]),
    ]
    if "keepdims" in settings:
        nodes[4] = node("ConcatFromSequence", ["u"], ["y"], axis=0, new_axis=1)
    model = model_of(nodes, X, ["y", "n"], WEIGHTS)
    assert worst_error(imported(model), model) == 0


def test_a_loop_collects() -> None:
    body = helper.make_graph(
        [
            node("Identity", ["going"], ["still"]),
            node("Mul", ["x", "x"], ["square"]),
            node("SequenceInsert", ["s", "square"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("more", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        node("SequenceEmpty", [], ["none"]),
        node("Loop", ["two", "", "none"], ["all"], body=body),
        node("ConcatFromSequence", ["all"], ["y"], axis=1),
    ]
    model = model_of(nodes, X, ["y"], WEIGHTS)
    assert worst_error(imported(model), model) < 1e-6


def test_a_function_of_each_element() -> None:
    inner = helper.make_graph(
        [node("Relu", ["e"], ["r"])],
        "each",
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("SequenceConstruct", ["x", "x"], ["s"]),
        node("SequenceMap", ["s"], ["m"], body=inner),
        node("SequenceAt", ["m", "one"], ["y"]),
    ]
    model = model_of(nodes, X, ["y"], WEIGHTS)
    assert worst_error(imported(model), model) == 0


def test_a_sequence_is_no_tensor() -> None:
    model = model_of([node("SequenceConstruct", ["x", "x"], ["s"])], X, ["s"])
    with pytest.raises(CaptureError, match="a sequence stands where a tensor must"):
        capture(model)
    outside = onnx.ModelProto.FromString(model.SerializeToString())
    outside.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None))
    with pytest.raises(CaptureError, match="no tensor with a known number of axes"):
        capture(outside)
