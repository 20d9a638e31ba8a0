"""A few bytes that ask for much memory or time: each ends in a sentence, most name the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.capture import Limits, capture
from graphopt.capture.onnx import importer
from graphopt.errors import CaptureError

HUGE = 1 << 40
CONSTANT, VALUE = r"raise Limits\.max_constant_bytes", r"raise Limits\.max_value_bytes"
Shape = Sequence[int | str]


def model_of(nodes: Sequence[Any], weights: dict[str, Any], shape: Shape = ("n", 4)) -> onnx.ModelProto:
    """Without shape inference, which would fail or take the memory itself. The last node makes the output."""
    graph = helper.make_graph(
        list(nodes),
        "asking",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def node(name: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(name, inputs, ["r"], **attributes)


HELD = np.ones((2, 70), np.float32)  # more than is known as numbers
IMAGE = (1, 1, 2, 2)
CASES: dict[str, tuple[Any, dict[str, Any], Shape, str]] = {
    "ConstantOfShape": (node("ConstantOfShape", "s"), {"s": ints(HUGE)}, ("n", 4), CONSTANT),
    "Range": (node("Range", "a", "b", "c"), {"a": 0, "b": HUGE, "c": 1}, ("n", 4), CONSTANT),
    "Tile of a weight": (node("Tile", "w", "s"), {"w": HELD, "s": ints(1 << 20, 1 << 20)}, ("n", 4), CONSTANT),
    "Tile of an input": (node("Tile", "x", "s"), {"s": ints(HUGE, 1)}, ("n", 4), VALUE),
    "Pad of a weight": (node("Pad", "w", "p"), {"w": HELD, "p": ints(0, HUGE, 0, 0)}, ("n", 4), CONSTANT),
    "Pad of an input": (node("Pad", "x", "p"), {"p": ints(0, HUGE, 0, 0)}, ("n", 4), VALUE),
    "Pad of fixed sizes": (node("Pad", "x", "p"), {"p": ints(0, HUGE, 0, 0)}, (2, 4), VALUE),
    "Resize": (
        node("Resize", "x", "", "", "s", mode="linear"),
        {"s": ints(1, 1, 1 << 20, 1 << 20)},
        IMAGE,
        VALUE,
    ),
    "OneHot": (
        node("OneHot", "i", "d", "v"),
        {"i": np.arange(100), "d": HUGE, "v": np.array([0, 1], np.float32)},
        ("n", 4),
        CONSTANT,
    ),
    "ConvTranspose": (
        node("ConvTranspose", "x", "k", strides=[1 << 20, 1 << 20]),
        {"k": np.ones((1, 1, 3, 3), np.float32)},
        IMAGE,
        VALUE,
    ),
    "Einsum": (node("Einsum", "x", "x", equation="i,j->ij"), {}, (1 << 20,), VALUE),
}


def refused(model: onnx.ModelProto, words: str, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
    with pytest.raises(CaptureError, match=words) as caught:
        capture(model, limits=limits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_one_operator(name: str) -> None:
    made, weights, shape, words = CASES[name]
    refused(model_of([made], weights, shape), words)


def test_expanded_and_then_computed_with() -> None:
    chain = [helper.make_node("Expand", ["w", "s"], ["e"]), node("Exp", "e")]
    refused(model_of(chain, {"w": np.ones((1, 70), np.float32), "s": ints(HUGE, 70)}), CONSTANT)
    chain[0] = helper.make_node("Expand", ["x", "s"], ["e"])
    refused(model_of(chain, {"s": ints(HUGE, 4)}, (1, 4)), VALUE)
    chain[1] = node("Identity", "e")  # takes no memory
    assert capture(model_of(chain, {"s": ints(HUGE, 4)}, (1, 4))).outputs[0].shape == (HUGE, 4)


def test_eye_like() -> None:
    chain = [helper.make_node("ConstantOfShape", ["s"], ["c"]), node("EyeLike", "c")]
    refused(model_of(chain, {"s": ints(1 << 20, 1 << 20)}), CONSTANT)


def test_limits_may_be_raised_and_lowered() -> None:
    model = model_of([node("Tile", "x", "s")], {"s": ints(1 << 10, 1 << 10)}, (1, 4))
    assert capture(model).outputs[0].shape == (1 << 10, 1 << 12)
    refused(model, f"takes {1 << 24} bytes, over the limit of {1 << 20}; {VALUE}", Limits(max_value_bytes=1 << 20))


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("Concat", ints(1, 1)),
        ("Mul", ints(3, 3)),
        ("Pow", ints(9)),
        ("Add", ints(1 << 61)),
        ("ReduceProd", ints(2**40, 2**40)),
    ],
)
def test_known_numbers_stay_few_and_small(name: str, start: Any) -> None:
    """Doubled forty times, they would take all memory."""
    settings: dict[str, Any] = {"axis": 0} if name == "Concat" else {}
    count = 1 if name == "ReduceProd" else 2
    names = ["s", *(f"s{index}" for index in range(40))]
    chain = [helper.make_node(name, [names[index]] * count, [names[index + 1]], **settings) for index in range(40)]
    refused(model_of([*chain, node("Reshape", "x", names[-1])], {"s": start}), "Reshape 'r'")


def test_known_numbers_are_not_broadcast_to_many() -> None:
    arrays = {
        f"w{axis}": np.arange(60).reshape([60 if place == axis else 1 for place in range(6)]) for axis in range(6)
    }
    chain = [helper.make_node("Max", list(arrays), ["m"]), helper.make_node("Reshape", ["m", "one"], ["t"])]
    refused(model_of([*chain, node("Reshape", "x", "t")], {**arrays, "one": ints(-1)}), "Reshape 'r'")


def test_known_numbers_wrap_around_as_tensors_do() -> None:
    """3 * 2^62 is 2^63 + 2^62, which is -2^62 in 64 bits."""
    chain = [
        helper.make_node("Mul", ["three", "much"], ["m"]),
        helper.make_node("Div", ["m", "much"], ["minus_one"]),
        node("Reshape", "x", "minus_one"),
    ]
    model = model_of(chain, {"three": ints(3), "much": ints(1 << 62)}, (2, 4))
    assert capture(model).outputs[0].shape == (8,)


def test_sizes_computed_in_many_steps() -> None:
    """Each step reads the one before three times; sympy would walk through all of them."""
    chain, last = [helper.make_node("Shape", ["x"], ["s"])], "s"
    for index in range(40):
        chain += [
            helper.make_node("Div", [last, "two"], [f"a{index}"]),
            helper.make_node("Mod", [last, "three"], [f"b{index}"]),
            helper.make_node("Add", [f"a{index}", f"b{index}"], [f"c{index}"]),
            helper.make_node("Add", [f"c{index}", last], [f"d{index}"]),
        ]
        last = f"d{index}"
    refused(model_of([*chain, node("Expand", "x", last)], {"two": 2, "three": 3}), "in over 1000 steps")


def loops(depth: int) -> list[Any]:
    """Loops within one another, each of as many trips as the weight `trips` says."""
    inner = [helper.make_node("Exp", ["x"], ["y"])]
    for level in range(depth):
        values = [
            helper.make_tensor_value_info(f"trip{level}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"going{level}", TensorProto.BOOL, []),
        ]
        nodes = [*inner, helper.make_node("Identity", [f"going{level}"], [f"on{level}"])]
        body = helper.make_graph(nodes, "body", values, [onnx.ValueInfoProto(name=f"on{level}")])
        inner = [helper.make_node("Loop", ["trips", "yes"], [], body=body)]
    return inner


def test_loops_within_loops() -> None:
    model = model_of([*loops(3), node("Relu", "x")], {"trips": 900, "yes": True})
    refused(model, r"over 200 nodes once its loops are written out; raise Limits\.max_nodes", Limits(max_nodes=200))
    model = model_of([*loops(2), node("Relu", "x")], {"trips": 4, "yes": True})
    assert capture(model).count_operators() == 1


def test_loops_take_so_many_trips_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "MOST_TRIPS_TOGETHER", 50)
    refused(model_of([*loops(2), node("Relu", "x")], {"trips": 9, "yes": True}), "over 50 trips together")
    assert capture(model_of([*loops(2), node("Relu", "x")], {"trips": 6, "yes": True}))
