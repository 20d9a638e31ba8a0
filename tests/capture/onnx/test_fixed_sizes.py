"""Sizes that a file leaves open and its nodes do not: fixed and equal ones are warned of, bounds are noted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn
from torch.export import Dim

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.errors import CaptureError, CaptureWarning, FeedError
from tests.capture.onnx.tiny import Array, model_of, worst_error

X: dict[str, tuple[str, Sequence[int | str]]] = {"x": ("float32", ["batch", "seq", 8])}
FIXED = r"axis 1 of input 'x' \(seq\) is 16 and nothing else: ONNX node {} has that number"


def model(node: Any, weights: dict[str, Array], shape: Sequence[int | str] = ("batch", "seq", 8)) -> onnx.ModelProto:
    return model_of([node], {"x": ("float32", shape)}, ["r"], weights)


def reshape(*target: int, **attributes: Any) -> onnx.ModelProto:
    return model(helper.make_node("Reshape", ["x", "t"], ["r"], name="heads", **attributes), {"t": np.array(target)})


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


POSITIONS = model(helper.make_node("Add", ["x", "p"], ["r"], name="positions"), {"p": zeros(1, 16, 8) + 1})
EXPAND = model(helper.make_node("Expand", ["x", "t"], ["r"], name="wide"), {"t": np.array([16, 5])}, shape=("seq", 1))


@pytest.mark.parametrize(
    ("source", "node", "shape"),
    [
        (reshape(-1, 16, 2, 4), "Reshape 'heads'", ("batch", 16, 8)),
        (reshape(0, 16, 2, 4), "Reshape 'heads'", ("batch", 16, 8)),
        (reshape(1, 16, 2, 4), "Reshape 'heads'", (1, 16, 8)),
        (POSITIONS, "Add 'positions'", ("batch", 16, 8)),
    ],
    ids=["inferred", "copied", "whole", "positions"],
)
def test_a_number_in_the_file_fixes_an_axis(source: Any, node: str, shape: tuple[int | str, ...]) -> None:
    """With examples and without, and other sizes are refused."""
    for examples in (None, (zeros(1, 16, 8),)):
        with pytest.warns(CaptureWarning) as caught:
            program = capture(source, examples)
        assert any(re.match(FIXED.format(node), str(item.message)) for item in caught)
        assert program.inputs[0].shape == shape and len(caught) == 2 - len(program.sizes)
        assert [str(item.message) for item in caught] == list(program.notes)
        assert {item.filename for item in caught} == {__file__}
        assert worst_error(program, source) == 0
    with pytest.raises(FeedError, match="axis 1 of input 'x' must be 16, got 17"):
        program(torch.zeros(1, 17, 8))
    with pytest.raises(CaptureError, match=r"must be 16, got 12; axis . of input 'x' .*has that number"):
        capture(source, (zeros(1, 12, 8),))


@pytest.mark.parametrize(
    "source",
    [reshape(0, -1, 2, 4), reshape(0, 0, 2, 4), reshape(-1, 8), reshape(-1, 2, 4), reshape(-1, 4)],
    ids=["inferred", "copied", "flat", "heads", "regrouped"],
)
def test_a_shape_that_keeps_sizes_open(source: Any) -> None:
    program = capture(source)
    assert program.inputs[0].shape == ("batch", "seq", 8) and not program.notes


def test_an_expanded_axis() -> None:
    with pytest.warns(CaptureWarning, match=r"axis 0 of input 'x' \(seq\) is 16 .* Expand 'wide'"):
        program = capture(EXPAND)
    assert program.outputs[0].shape == (16, 5) and worst_error(program, EXPAND) == 0
    twin = model(helper.make_node("Expand", ["x", "t"], ["r"]), {"t": np.array([1, 5])}, shape=("seq", 1))
    assert capture(twin).outputs[0].shape == ("seq", 5)


def test_examples_of_one_row_are_broadcast() -> None:
    with pytest.warns(CaptureWarning, match=r"axis 1 of input 'x' \(seq\) is 1 and"):
        program = capture(POSITIONS, (zeros(3, 1, 8),))
    assert program.outputs[0].shape == ("batch", 16, 8) and worst_error(program, POSITIONS) == 0


def test_examples_tell_regrouping_from_a_fixed_size() -> None:
    program = capture(reshape(-1, 16, 2, 4), (zeros(2, 32, 8),))
    assert program.inputs[0].shape == ("batch", "seq", 8)
    assert program(torch.zeros(1, 64, 8))[0].shape == (4, 16, 2, 4)


def test_examples_tell_which_sizes_make_a_product() -> None:
    with pytest.warns(CaptureWarning) as caught:
        program = capture(reshape(48 * 8), (zeros(3, 16, 8),))
    assert program.inputs[0].shape == (3, 16, 8) and len(caught) == 2


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "examples"])
def test_equal_sizes_are_fixed_together(given: bool) -> None:
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], name="sum"),
        helper.make_node("Reshape", ["sum", "t"], ["r"], name="heads"),
    ]
    inputs: dict[str, Any] = {**X, "y": ("float32", ["batch", "length", 8])}
    with pytest.warns(CaptureWarning) as caught:
        source = model_of(nodes, inputs, ["r"], {"t": np.array([-1, 16, 2, 4])})
        program = capture(source, (zeros(2, 16, 8), zeros(2, 16, 8)) if given else None)
    assert [spec.shape for spec in program.inputs] == [("batch", 16, 8)] * 2
    assert sorted(str(item.message)[:28] for item in caught) == [
        "axis 1 of input 'x' (seq) is", "axis 1 of input 'y' (length)"
    ]  # fmt: skip


def test_a_product_is_no_number_of_the_file() -> None:
    """The weight's rows say what the axis is, and the file should have said so."""
    node = helper.make_node("MatMul", ["x", "w"], ["r"], name="product")
    with pytest.raises(CaptureError, match="MatMul 'product'"):
        capture(model_of([node], {"x": ("float32", [2, "n"])}, ["r"], {"w": zeros(5, 2)}), (zeros(2, 5),))


def test_an_axis_that_the_caller_asks_for() -> None:
    with pytest.warns(CaptureWarning, match=r"axis 1 of input 'x' \(length\) is 16 .*Reshape 'heads'"):
        program = capture(reshape(-1, 16, 2, 4), dynamic_shapes={"x": {0: "rows", 1: Dim("length", max=64)}})
    assert program.inputs[0].shape == ("rows", 16, 8)
    with pytest.raises(CaptureError, match="axis 1 of input 'x' can only be 16 in this model, which its Dim 'length'"):
        capture(reshape(-1, 16, 2, 4), dynamic_shapes={"x": {0: "rows", 1: Dim("length", max=12)}})
    with pytest.raises(CaptureError, match="axis 2 of input 'x' was asked to be dynamic"):
        capture(reshape(0, 0, 2, 4), dynamic_shapes={"x": {2: "width"}})


def two_inputs(first: Sequence[int | str], second: Sequence[int | str]) -> onnx.ModelProto:
    node = helper.make_node("Add", ["x", "y"], ["r"], name="sum")
    return model_of([node], {"x": ("float32", first), "y": ("float32", second)}, ["r"])


def test_sizes_that_must_be_equal() -> None:
    with pytest.warns(CaptureWarning, match="the sizes 'm' and 'n' are one: ONNX node Add 'sum' needs them equal"):
        program = capture(two_inputs(["n", 4], ["m", 4]))
    assert len(program.sizes) == 1 and len(program.notes) == 1
    assert not capture(two_inputs(["n", 4], ["n", 4])).notes
    assert not capture(two_inputs(["n", 4], ["m", 4]), dynamic_shapes={"y": {0: "n"}}).notes
    with pytest.raises(CaptureError, match="must be equal in this model"):
        capture(two_inputs(["n", 4], ["m", 4]), dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})


def test_axes_without_names_may_be_equal() -> None:
    """That is noted and no warning: nothing says that they differ."""
    source = two_inputs(["n", 4], ["m", 4])
    source.graph.input[1].type.tensor_type.shape.dim[0].ClearField("dim_param")
    (note,) = capture(source).notes
    assert note.startswith("the sizes 'n' and 'y_axis_0' are one") or note.startswith("the sizes 'y_axis_0' and 'n'")


def test_a_size_that_is_a_sum() -> None:
    nodes = [
        helper.make_node("Concat", ["past", "new"], ["all"], axis=1),
        helper.make_node("Add", ["all", "mask"], ["r"], name="masked"),
    ]
    shapes: dict[str, Any] = {
        name: ("float32", [2, size]) for name, size in (("past", "p"), ("new", "s"), ("mask", "t"))
    }
    examples = (zeros(2, 3), zeros(2, 4), zeros(2, 7))
    with pytest.warns(CaptureWarning, match=r"size 't' is p \+ s: ONNX node Add 'masked' needs that"):
        program = capture(model_of(nodes, shapes, ["r"]), examples)
    assert program.inputs[2].shape == (2, "p + s")


def positions_cut() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["p", "zero", "length", "one"], ["cut"], name="cut"),
        helper.make_node("Add", ["x", "cut"], ["r"]),
    ]
    return model_of(nodes, X, ["r"], {"p": zeros(1, 16, 8), "zero": np.array([0]), "one": np.array([1])})


def test_a_bound_is_noted_and_not_warned_of() -> None:
    program = capture(positions_cut())
    assert program.sizes["seq"].high == 16
    assert program.notes == ("size 'seq' is at most 16: ONNX node Slice 'cut' needs that",)
    assert graphopt.optimize(program, "O1").report.notes == program.notes


def test_notes_travel(tmp_path: Path) -> None:
    program = capture(positions_cut())
    program.save(str(tmp_path / "m.pt2"))
    assert capture(tmp_path / "m.pt2").notes == program.notes
    assert graphopt.compile(program).report["entries"]["main"]["notes"] == list(program.notes)


class Heads(nn.Module):
    """Its example's length is a number in the code."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self.length or x.shape[1], 2, 4).transpose(1, 2)


def exported(length: int | None, folder: Path) -> Program:
    path, axes = folder / f"{length}.onnx", {"x": {0: "batch", 1: "seq"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Heads(length), (torch.zeros(1, 16, 8),), path, dynamo=False, input_names=["x"], dynamic_axes=axes
        )
    return capture(path)


def test_what_an_exporter_writes(tmp_path: Path) -> None:
    with pytest.warns(CaptureWarning, match=r"\(seq\) is 16 and nothing else: ONNX node Reshape"):
        assert exported(16, tmp_path).inputs[0].shape == ("batch", 16, 8)
    assert exported(None, tmp_path).inputs[0].shape == ("batch", "seq", 8)
