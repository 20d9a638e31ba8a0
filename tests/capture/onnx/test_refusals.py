"""What cannot be imported ends in one sentence that names the node or value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphopt
from graphopt.capture import Limits, capture
from graphopt.errors import CaptureError, FeedError, UnknownNameError
from tests.capture.onnx.tiny import model_of, worst_error

X: dict[str, tuple[str, Sequence[int | str]]] = {"x": ("float32", ["n", 4])}


def _relu(name: str = "relu", source: str = "x", result: str = "r") -> Any:
    return helper.make_node("Relu", [source], [result], name=name)


def _refused(model: Any, *words: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(model)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_scale_that_gives_no_whole_size() -> None:
    node = helper.make_node("Resize", ["x", "", "by"], ["r"], name="smaller", mode="linear")
    image: dict[str, tuple[str, Sequence[int | str]]] = {"x": ("float32", [1, 2, "n", 8])}
    model = model_of([node], image, ["r"], {"by": np.array([1, 1, 0.6, 0.5], dtype=np.float32)})
    _refused(model, "Resize 'smaller'", "Resize of a dynamic size by a fraction")
    image = {"x": ("float32", [1, 2, 8, 8])}
    for factor, size in ((0.6, 4), (0.75, 6)):
        model = model_of([node], image, ["r"], {"by": np.array([1, 1, factor, 0.5], dtype=np.float32)})
        assert capture(model).outputs[0].shape == (1, 2, size, 4) and worst_error(capture(model), model) < 1e-5


def test_all_unknown_operators_are_listed() -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"], name="noise"),
        helper.make_node("Fancy", ["x"], ["b"], name="own", domain="mine"),
        helper.make_node("RandomNormalLike", ["x"], ["c"], name="again"),
    ]
    _refused(model_of(nodes, X, ["a"]), "opset 20", "RandomNormalLike (noise, again)", "mine.Fancy (own)")


def test_an_attribute_nobody_reads() -> None:
    node = helper.make_node("Relu", ["x"], ["r"], name="odd", slope=0.1)
    _refused(model_of([node], X, ["r"]), "Relu 'odd'", "'slope'")


def test_an_attribute_of_the_wrong_type() -> None:
    node = helper.make_node("Softmax", ["x"], ["r"], name="odd", axis=1.5)
    _refused(model_of([node], X, ["r"]), "Softmax 'odd'", "'axis' is not of type INT")


def test_too_many_inputs() -> None:
    node = helper.make_node("Relu", ["x", "x"], ["r"], name="two")
    _refused(model_of([node], X, ["r"]), "Relu 'two'", "has 2 inputs", "with 1")


def test_an_input_left_out() -> None:
    node = helper.make_node("Add", ["", "x"], ["r"], name="half")
    _refused(model_of([node], X, ["r"]), "Add 'half'", "input 0 is left out")


def test_a_cycle() -> None:
    nodes = [_relu("first", "b", "a"), _relu("second", "a", "b")]
    _refused(model_of(nodes, X, ["b"]), "Relu 'first' reads 'b'", "cycle")


def test_a_value_nobody_makes() -> None:
    _refused(model_of([_relu(source="gone")], X, ["r"]), "reads 'gone', which nothing makes")
    _refused(model_of([_relu()], X, ["gone"]), "output 'gone'")


def test_names_that_occur_twice() -> None:
    _refused(model_of([_relu(), _relu("second")], X, ["r"]), "two values", "'r'")
    _refused(model_of([_relu(result="x")], X, ["x"]), "two values", "'x'")


def test_shapes_that_do_not_fit() -> None:
    node = helper.make_node("Add", ["x", "w"], ["r"], name="sum")
    _refused(model_of([node], X, ["r"], {"w": np.ones(3, np.float32)}), "Add 'sum' of [", "[3] cannot be imported")


def test_sizes_from_values_at_run_time() -> None:
    node = helper.make_node("Reshape", ["x", "s"], ["r"], name="shape")
    inputs = {**X, "s": ("int64", [2])}
    _refused(model_of([node], inputs, ["r"]), "Reshape 'shape'", "at run time")


def test_a_dynamic_size_that_must_be_one_number() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["r"], name="product")
    model = model_of([node], {"x": ("float32", [2, "n"])}, ["r"], {"w": np.ones((5, 2), np.float32)})
    _refused(model, "MatMul 'product'", "n")


@pytest.mark.parametrize(("opset", "words"), [(5, ("opset 5", "7 and later")), (99, ("opset 99", "newer onnx"))])
def test_opsets_outside_those_that_are_known(opset: int, words: tuple[str, ...]) -> None:
    _refused(model_of([_relu()], X, ["r"], opset=opset), *words)


def test_strings_and_small_unsigned_types() -> None:
    model = model_of([_relu()], X, ["r"])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    _refused(model, "input 'x'", "string")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    _refused(tmp_path / "m.onnx", "m.onnx", "no ONNX model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    _refused(tmp_path / "empty.onnx", "no graph")
    _refused(tmp_path / "gone.onnx", "gone.onnx cannot be read")
    (tmp_path / "folder.onnx").mkdir()
    _refused(tmp_path / "folder.onnx", "folder.onnx is no file")


def test_limits(tmp_path: Path) -> None:
    model = model_of([_relu(), _relu("more", "r", "s")], X, ["s"])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CaptureError, match=r"Limits\.max_nodes"):
        capture(model, limits=Limits(max_nodes=1))
    with pytest.raises(CaptureError, match=r"Limits\.max_bytes"):
        capture(tmp_path / "m.onnx", limits=Limits(max_bytes=10))


def test_examples_and_dynamic_sizes_are_checked() -> None:
    model = model_of([_relu()], X, ["r"])
    with pytest.raises(CaptureError, match="do not fit"):
        capture(model, (torch.ones(2, 3),))
    with pytest.raises(UnknownNameError, match="'y'"):
        capture(model, dynamic_shapes={"y": {0: "rows"}})
    with pytest.raises(CaptureError, match="axis 1"):
        capture(model, dynamic_shapes={"x": {1: "width"}})
    program = graphopt.capture(model, (np.ones((3, 4), np.float32),), dynamic_shapes={"x": {0: "rows"}})
    assert program.inputs[0].shape == ("rows", 4) and program.examples[0].shape == (3, 4)
    with pytest.raises(FeedError):
        program(torch.ones(2, 3))


def test_sizes_that_the_file_does_not_relate() -> None:
    add = helper.make_node("Concat", ["past", "new"], ["r"], axis=1)
    shapes: dict[str, tuple[str, Sequence[int | str]]] = {"past": ("float32", [2, "p"]), "new": ("float32", [2, "s"])}
    both = helper.make_node("Add", ["r", "mask"], ["sum"], name="sum")
    model = model_of([add, both], {**shapes, "mask": ("float32", [2, "total"])}, ["sum"])
    program = capture(model, dynamic_shapes={"mask": {1: "p + s"}})
    assert program.inputs[2].shape == (2, "p + s") and program.outputs[0].shape == (2, "p + s")
    assert worst_error(program, model) == 0
    with pytest.raises(CaptureError, match="axis 0"):
        capture(model, dynamic_shapes={"mask": {0: "p + s", 1: "p + s"}})


def test_a_weight_called_like_an_operator() -> None:
    node = helper.make_node("Add", ["x", "embedding"], ["r"])
    model = model_of([node], X, ["r"], {"embedding": np.ones(4, np.float32)})
    assert worst_error(capture(model), model) == 0
