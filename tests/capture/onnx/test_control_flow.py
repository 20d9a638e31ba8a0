"""If on run-time values as torch.cond, and loops that are written out."""

from __future__ import annotations

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
from graphopt.capture.onnx import control_flow
from graphopt.errors import CaptureError
from tests.capture.onnx.tiny import Array, model_of

BODY_INPUTS = [
    helper.make_tensor_value_info("i", TensorProto.INT64, []),
    helper.make_tensor_value_info("before", TensorProto.BOOL, []),
    helper.make_tensor_value_info("carried", TensorProto.FLOAT, ["n", 4]),
]
RNG = np.random.default_rng(0)
W, V = (RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(2))


def graph_of(nodes: list[Any], outputs: list[str], inputs: Any = (), weights: dict[str, Array] | None = None) -> Any:
    held = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    values = [onnx.ValueInfoProto(name=name) for name in outputs]
    return helper.make_graph(nodes, "inner", list(inputs), values, held)


def conditional(then: Any, otherwise: Any, extra: list[Any] | None = None, shape: tuple[Any, ...] = ("n", 4)) -> Any:
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        *(extra or []),
        helper.make_node("If", ["positive"], ["y"], name="choice", then_branch=then, else_branch=otherwise),
    ]
    return model_of(nodes, {"x": ("float32", shape)}, ["y"], {"zero": np.array(0, np.float32), "outer": V}, opset=17)


def check(model: onnx.ModelProto, feeds: list[Array]) -> Program:
    """Eagerly, compiled and saved as `.pt2`, against ONNX Runtime."""
    program = capture(model)
    session = graphopt.compile(program).session()
    theirs = onnxruntime.InferenceSession(model.SerializeToString())
    for feed in feeds:
        wanted = theirs.run(None, {"x": feed})
        for ours, compiled, value in zip(
            program(torch.from_numpy(feed)), session.run(None, {"x": feed}), wanted, strict=True
        ):
            np.testing.assert_allclose(ours.numpy(), value, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(compiled, value, rtol=1e-5, atol=1e-5)
    return program


def both_signs(*shapes: tuple[int, ...]) -> list[Array]:
    return [
        sign * (np.abs(RNG.standard_normal(shape)) + 0.1).astype(np.float32) for shape in shapes for sign in (1, -1)
    ]


def test_branches_with_weights_and_outer_values(tmp_path: Any) -> None:
    then = graph_of([helper.make_node("MatMul", ["square", "w"], ["t"])], ["t"], weights={"w": W})
    otherwise = graph_of(
        [helper.make_node("MatMul", ["x", "outer"], ["m"]), helper.make_node("Add", ["m", "square"], ["e"])], ["e"]
    )
    program = check(conditional(then, otherwise), both_signs((3, 4), (1, 4), (7, 4)))
    assert len(list(program.graphs())) == 3 and program.outputs[0].shape == ("n", 4)
    program.save(str(tmp_path / "m.pt2"))
    assert len(list(capture(tmp_path / "m.pt2").graphs())) == 3
    result = graphopt.optimize(program, "O2")
    assert len(list(result.program.graphs())) == 3
    program.to_onnx(str(tmp_path / "m.onnx"))
    again = onnx.load(tmp_path / "m.onnx")
    assert "If" in {node.op_type for node in again.graph.node}
    check(again, both_signs((3, 4)))


@pytest.mark.slow
def test_sizes_and_constants_inside() -> None:
    then = graph_of(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("ConstantOfShape", ["s"], ["t"], value=numpy_helper.from_array(np.array([2], np.float32))),
        ],
        ["t"],
    )
    otherwise = graph_of([helper.make_node("Identity", ["x"], ["e"])], ["e"])
    check(conditional(then, otherwise), both_signs((3, 4), (5, 4)))


@pytest.mark.slow
def test_strides_may_differ() -> None:
    then = graph_of([helper.make_node("Transpose", ["square"], ["t"], perm=[1, 0])], ["t"])
    otherwise = graph_of([helper.make_node("Relu", ["x"], ["e"])], ["e"])
    after = conditional(then, otherwise, shape=(4, 4))
    after.graph.node.append(helper.make_node("Reshape", ["y", "flat"], ["z"]))
    after.graph.initializer.append(numpy_helper.from_array(np.array([16]), "flat"))
    after.graph.output[0].name = "z"
    check(after, both_signs((4, 4)))


def test_branches_within_branches() -> None:
    inner = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "one"], ["large"]),
    ]
    large = graph_of([helper.make_node("MatMul", ["square", "outer"], ["l"])], ["l"])
    small = graph_of([helper.make_node("Neg", ["square"], ["k"])], ["k"])
    node = helper.make_node("If", ["large"], ["t"], then_branch=large, else_branch=small)
    then = graph_of([*inner, node], ["t"], weights={"one": np.array(1, np.float32)})
    otherwise = graph_of([helper.make_node("Exp", ["x"], ["e"])], ["e"])
    program = check(conditional(then, otherwise), [*both_signs((3, 4)), np.full((3, 4), 0.5, np.float32)])
    assert len(list(program.graphs())) == 5


def test_results_must_agree() -> None:
    then = graph_of([helper.make_node("ReduceSum", ["x"], ["t"], keepdims=0)], ["t"])
    otherwise = graph_of([helper.make_node("Exp", ["x"], ["e"])], ["e"])
    with pytest.raises(CaptureError, match=r"If 'choice'.*output 0 of the If is float32 \[\] and float32 \[s\d+, 4\]"):
        capture(conditional(then, otherwise))


def _looped(trips: Array | None, condition: str = "yes", body: Any = None) -> onnx.ModelProto:
    body = body or graph_of(
        [
            helper.make_node("MatMul", ["carried", "outer"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["next", "f"], ["kept"]),
            helper.make_node("Less", ["i", "two"], ["on"]),
        ],
        [condition, "next", "kept"],
        BODY_INPUTS,
        {"two": np.array(2)},
    )
    names = ["trips" if trips is not None else "", "start", "x"]
    weights = {"outer": V, "start": np.array(True), **({"trips": trips} if trips is not None else {})}
    nodes = [helper.make_node("Loop", names, ["last", "all"], name="steps", body=body)]
    return model_of(nodes, {"x": ("float32", ("n", 4))}, ["last", "all"], weights, opset=17)


@pytest.mark.parametrize(
    ("trips", "condition"),
    [
        (np.array(3), "before"),
        pytest.param(np.array(9), "on", marks=pytest.mark.slow),
        pytest.param(None, "on", marks=pytest.mark.slow),
    ],
)
def test_loops_with_a_known_end(trips: Array | None, condition: str) -> None:
    program = check(_looped(trips, condition), both_signs((3, 4), (1, 4)))
    assert program.outputs[1].shape == (3, "n", 4)
    assert len([node for node in program.nodes() if "tanh" in str(node.target)]) == 3


def test_loops_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flow, "MOST_TRIPS", 20)
    with pytest.raises(CaptureError, match="over 20 trips"):
        capture(_looped(None, "before"))
    with pytest.raises(CaptureError, match="over 20 trips"):
        capture(_looped(np.array(2**40), "before"))
    body = graph_of(
        [
            helper.make_node("ReduceSum", ["carried"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "zero"], ["on"]),
            helper.make_node("Neg", ["carried"], ["next"]),
            helper.make_node("Identity", ["next"], ["kept"]),
        ],
        ["on", "next", "kept"],
        BODY_INPUTS,
        {"zero": np.array(0, np.float32)},
    )
    with pytest.raises(CaptureError, match=r"Loop 'steps'.*ends by values at run time"):
        capture(_looped(None, body=body))
