"""Types of two and four bits that nodes give: what reads them sees the type, not what holds their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphopt.backends.onnx import prepare
from graphopt.capture import capture
from graphopt.errors import CaptureError, RunError
from tests.capture.onnx.tiny import model_of

X = torch.tensor([100.0, -100.0])


def low(values: list[int], kind: int = TensorProto.INT4) -> onnx.TensorProto:
    return helper.make_tensor("", kind, [len(values)], values)


def constant(name: str, value: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=value)


ONE = constant("one", helper.make_tensor("", TensorProto.INT64, [1], [1]))
ZEROS: dict[str, list[onnx.NodeProto]] = {
    "Constant": [constant("z", low([0]))],
    "ConstantOfShape": [ONE, helper.make_node("ConstantOfShape", ["one"], ["z"], value=low([0]))],
    "Cast": [ONE, helper.make_node("Sub", ["one", "one"], ["n"]), helper.make_node("Cast", ["n"], ["z"], to=22)],
    "CastLike": [ONE, constant("t", low([0])), helper.make_node("Sub", ["one", "one"], ["n"]),
                 helper.make_node("CastLike", ["n", "t"], ["z"])],
}  # fmt: skip


def model(nodes: list[onnx.NodeProto], inputs: Any = None, output: int = TensorProto.INT4) -> onnx.ModelProto:
    made = model_of(nodes, inputs or {"x": ("float32", [2])}, ["y"], {"s": np.ones(1, np.float32)}, opset=25)
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info("y", output, [2]))
    return made


def quantize(zero: list[onnx.NodeProto], output: int = TensorProto.INT4) -> onnx.ModelProto:
    return model([*zero, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], output=output)


@pytest.mark.parametrize("how", ZEROS)
def test_codes_end_where_the_zero_point_does(how: str) -> None:
    assert capture(quantize(ZEROS[how]))(X)[0].tolist() == [7, -8]


def test_floats_of_four_bits_end_at_six() -> None:
    kind = TensorProto.FLOAT4E2M1
    made = quantize([constant("z", helper.make_tensor("", kind, [1], [0.0]))], kind)
    assert capture(made)(X)[0].float().tolist() == [6, -6]
    assert [float(item) for item in prepare(made).run([X.numpy()])[0]] == [6, -6]


def test_a_type_alone_is_that_of_a_constant() -> None:
    made = model([constant("t", low([0])), helper.make_node("CastLike", ["x", "t"], ["y"])])
    assert capture(made)(torch.tensor([9.0, -3.0]))[0].tolist() == [-7, -3]


def branch(value: onnx.TensorProto) -> onnx.GraphProto:
    result = helper.make_tensor_value_info("b", value.data_type, [1])
    return helper.make_graph([constant("b", value)], "branch", [], [result])


def choice(then: onnx.TensorProto, otherwise: onnx.TensorProto) -> onnx.ModelProto:
    condition = helper.make_node("If", ["c"], ["z"], then_branch=branch(then), else_branch=branch(otherwise))
    nodes = [condition, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    return model(nodes, {"x": ("float32", [2]), "c": ("bool", [])})


def test_branches_keep_the_type() -> None:
    program = capture(choice(low([0]), low([-2])))
    assert program(X / 40, torch.tensor(True))[0].tolist() == [2, -2]
    assert program(X / 40, torch.tensor(False))[0].tolist() == [0, -4]
    assert program(X, torch.tensor(False))[0].tolist() == [7, -8]
    with pytest.raises(CaptureError, match=r"is int4 .* and int2 "):
        capture(choice(low([0]), low([0], TensorProto.INT2)))


def test_what_is_cast_to_eight_bits_has_eight() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=22), helper.make_node("Cast", ["a"], ["b"], to=TensorProto.INT8)]
    made = model([*nodes, helper.make_node("Add", ["b", "b"], ["y"])], output=TensorProto.INT8)
    assert capture(made)(torch.tensor([7.0, -8.0]))[0].tolist() == [14, -16]


def test_numbers_that_the_type_has_not_are_an_error() -> None:
    made = model([helper.make_node("Identity", ["x"], ["y"])])
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.INT4
    prepared = prepare(made)
    assert prepared.run([np.array([7, -8], np.int8)])[0].tolist() == [7, -8]
    with pytest.raises(RunError, match="output 'y' is of type int4, and the program gives 100"):
        prepared.run([np.array([7, 100], np.int8)])
