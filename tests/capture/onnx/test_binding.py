"""Inputs that decide shapes, axes and counts are bound to their examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import BoundInputError, Program
from graphopt.capture import capture
from graphopt.checking.branches import search_branches
from graphopt.checking.samples import Drawn, draw_samples, with_empty_masks
from graphopt.data.feeds import read_inputs
from graphopt.errors import CaptureError, CaptureWarning, FeedError
from tests.capture.onnx.test_control_flow import graph_of
from tests.capture.onnx.tiny import Array, model_of, worst_error
from tests.capture.test_pt2 import edit_json, rewritten

Inputs = dict[str, tuple[str, Sequence[int | str]]]
X: Inputs = {"x": ("float32", ["n", 4])}
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4) % 5
ONE, TWO = np.array([1]), np.array([2])


def top_k(count: Sequence[int | str] = (1,)) -> onnx.ModelProto:
    nodes = [helper.make_node("TopK", ["x", "k"], ["values", "places"], name="largest")]
    return model_of(nodes, {**X, "k": ("int64", count)}, ["values", "places"])


def bound_top_k() -> Program:
    return capture(top_k(), {"x": ROWS, "k": TWO})


def test_a_count_is_bound_to_its_example() -> None:
    program = bound_top_k()
    assert program.bound.keys() == {"k"} and program.bound["k"].tolist() == [2]
    assert program.outputs[0].shape == ("n", 2) and program.inputs[1].shape == (1,)
    assert worst_error(program, top_k()) == 0
    assert graphopt.optimize(program, "O1").program.bound == program.bound


def test_another_value_is_refused_where_the_program_runs() -> None:
    program = bound_top_k()
    with pytest.raises(BoundInputError, match=r"'k' is bound to \[2\], got \[3\]; capture the model again"):
        program(torch.ones(3, 4), torch.tensor([3]))
    with pytest.raises(FeedError, match="'k' must be torch"):
        program(torch.ones(3, 4), torch.tensor([2.0]))
    with pytest.raises(CaptureError, match="bound to"):
        capture(noted('{"k": [2]}'), {"x": ROWS, "k": ONE})


def test_data_may_leave_it_out_and_not_have_another_value() -> None:
    program = bound_top_k()
    for feed in ({"x": ROWS}, {"x": ROWS, "k": TWO}):
        assert read_inputs(program, feed, "sample 0")[1].tolist() == [2]
    with pytest.raises(BoundInputError, match="sample 0: input 'k' is bound"):
        read_inputs(program, {"x": ROWS, "k": ONE}, "sample 0")
    with pytest.raises(FeedError, match="lacks 'x'"):
        read_inputs(program, {"k": TWO}, "sample 0")


def test_npz_data_may_leave_it_out(tmp_path: Path) -> None:
    program = bound_top_k()
    rows = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    np.savez(tmp_path / "feeds.npz", x=np.stack([rows, rows]), k=np.array([[2], [2]]))
    np.savez(tmp_path / "other.npz", x=np.stack([rows, rows]), k=np.array([[2], [3]]))
    for name in ("rows", "feeds"):
        result = graphopt.optimize(program, "O1", data=str(tmp_path / f"{name}.npz"), metric="cosine")
        assert result.report.metric is not None and result.report.metric.after > 0.99
    with pytest.raises(BoundInputError):
        graphopt.optimize(program, "O1", data=str(tmp_path / "other.npz"), metric="cosine")


def test_compiled_saved_and_opened_again(tmp_path: Path) -> None:
    """An entry for each value."""
    three = capture(top_k(), {"x": ROWS, "k": np.array([3])})
    graphopt.compile({"two": bound_top_k(), "three": three}).save(tmp_path / "m.gopt")
    session = graphopt.load(tmp_path / "m.gopt")
    for entry, count in (("two", 2), ("three", 3)):
        for rows in (ROWS, ROWS[:1], np.concatenate([ROWS, ROWS])):
            values, places = session.run(None, {"x": rows, "k": np.array([count])}, entry=entry)
            assert np.array_equal(values, -np.sort(-rows)[:, :count]) and places.shape == values.shape
        with pytest.raises(BoundInputError, match=rf"'k' is bound to \[{count}\], got \[4\]"):
            session.run(None, {"x": ROWS, "k": np.array([4])}, entry=entry)
        with pytest.raises(FeedError, match="'k' has shape"):
            session.run(None, {"x": ROWS, "k": np.array([2, 2])}, entry=entry)
        assert session.manifest.entries[entry].inputs[1].bound == (count,)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_written_and_read_again(suffix: str, tmp_path: Path) -> None:
    program = bound_top_k()
    path = str(tmp_path / f"m.{suffix}")
    (program.save if suffix == "pt2" else program.to_onnx)(path)
    again = capture(path)
    assert again.bound == program.bound and again.bound["k"].dtype == torch.int64
    assert (again.inputs, again.outputs) == (program.inputs, program.outputs)
    inputs = (torch.from_numpy(ROWS), torch.tensor([2]))
    for ours, theirs in zip(again(*inputs), program(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def noted(text: str) -> onnx.ModelProto:
    """The file with this metadata, as export writes it."""
    model = top_k()
    model.metadata_props.add(key="graphopt.bound", value=text)
    return model


@pytest.mark.parametrize(
    "text", ['{"k": [2, 3]}', '{"k": "2"}', '{"k": ["2"]}', '{"k": [1e30]}', '{"k": [2.5]}', '{"x": [1.0]}']
)
def test_damaged_metadata(text: str) -> None:
    with pytest.raises(CaptureError, match=r"graphopt\.bound in the file's metadata is (no value|a value of another)"):
        capture(noted(text))


def test_metadata_binds_and_that_of_others_does_not() -> None:
    assert capture(noted('{"k": [3], "gone": [1]}')).outputs[0].shape == ("n", 3)
    for text in ("{not ours", "[2]", '{"gone": [1]}'):
        with pytest.raises(CaptureError, match="give example_inputs"):
            capture(noted(text))


def test_a_damaged_sidecar(tmp_path: Path) -> None:
    bound_top_k().save(str(tmp_path / "m.pt2"))

    def change(value: Any) -> None:
        value["inputs"][1]["bound"] = ["2"]

    with pytest.raises(CaptureError, match="damaged; save it again"):
        capture(rewritten(tmp_path / "m.pt2", tmp_path / "bad.pt2", edit_json("graphopt.json", change)))


def _node(operator: str, inputs: str, outputs: str = "r", **attributes: Any) -> Any:
    return helper.make_node(operator, inputs.split(), outputs.split(), name="it", **attributes)


CONSUMERS: dict[str, tuple[Any, Array, Mapping[str, Array]]] = {
    "reshape": (_node("Reshape", "x s"), np.array([-1, 2]), {}),
    "expand": (_node("Expand", "x s"), np.array([5, 1, 4]), {}),
    "slice": (_node("Slice", "x s two axes"), ONE, {"two": TWO, "axes": ONE}),
    "range": (_node("Range", "zero s by"), np.array(5), {"zero": np.array(0), "by": np.array(1)}),
    "pad": (_node("Pad", "x s"), np.array([0, 1, 0, 2]), {}),
    "tile": (_node("Tile", "x s"), np.array([1, 3]), {}),
    "fill": (_node("ConstantOfShape", "s"), np.array([70, 3]), {}),
    "split": (_node("Split", "x s", "r rest", axis=1), np.array([1, 3]), {}),
    "axis": (_node("CumSum", "x s"), np.array(1), {}),
    "axes": (_node("ReduceSum", "x s", keepdims=0), ONE, {}),
    "new axes": (_node("Unsqueeze", "x s"), np.array([0, 3]), {}),
    "depth": (
        _node("OneHot", "places s values"), np.array(3),
        {"places": np.array([0, 2]), "values": np.array([0, 1], np.float32)},
    ),
    "diagonal": (_node("Trilu", "x s"), np.array(-1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSUMERS)
def test_whatever_reads_numbers(name: str) -> None:
    node, example, weights = CONSUMERS[name]
    inputs: Inputs = {**X, "s": ("int64", example.shape)}
    model = model_of([node], inputs, list(node.output), dict(weights))
    program = capture(model, {"x": ROWS, "s": example})
    assert program.bound["s"].tolist() == example.tolist()
    assert worst_error(program, model) < 1e-6
    with pytest.raises(CaptureError, match="values of input 's' at run time; give example_inputs with it"):
        capture(model)


def test_floating_scales() -> None:
    node = _node("Resize", "x  s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    node.input[:] = ["x", "", "s"]
    model = model_of([node], {"x": ("float32", ["n", 2, 3, 3]), "s": ("float32", [4])}, ["r"])
    image, scales = np.ones((2, 2, 3, 3), np.float32), np.array([1, 1, 2, 3], np.float32)
    program = capture(model, {"x": image, "s": scales})
    assert program.bound["s"].tolist() == [1, 1, 2, 3] and program.outputs[0].shape == ("n", 2, 6, 9)
    assert worst_error(program, model) == 0
    scales[2] = np.inf
    with pytest.raises(CaptureError, match="at run time, which graphopt cannot express"):
        capture(model, {"x": image, "s": scales})


def test_through_arithmetic_and_beside_dynamic_sizes() -> None:
    """The rows come from the other input and stay dynamic."""
    nodes = [
        helper.make_node("Cast", ["s"], ["long"], to=TensorProto.INT64),
        helper.make_node("Gather", ["long", "place"], ["g"]),
        helper.make_node("Add", ["g", "one"], ["width"]),
        helper.make_node("Shape", ["x"], ["rows"], end=1),
        helper.make_node("Concat", ["rows", "width", "minus"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
    ]
    weights = {"place": ONE, "one": ONE, "minus": np.array([-1])}
    model = model_of(nodes, {**X, "s": ("int32", [2])}, ["r"], weights)
    program = capture(model, {"x": ROWS, "s": np.array([7, 1], np.int32)})
    assert program.bound["s"].tolist() == [7, 1] and program.outputs[0].shape == ("n", 2, 2)
    assert worst_error(program, model) == 0


def test_activations_are_not_bound() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["whole", "zero"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["r", "places"], name="largest"),
    ]
    with pytest.raises(CaptureError, match=r"TopK 'largest'.*at run time, which graphopt cannot express"):
        capture(model_of(nodes, X, ["r"], {"zero": np.array([0])}), {"x": ROWS})


@pytest.mark.parametrize(("length", "fits"), [(200, True), (5000, False)])
def test_long_inputs(length: int, fits: bool) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["lengths"], ["most"], keepdims=1),
        helper.make_node("TopK", ["x", "most"], ["r", "places"]),
    ]
    model = model_of(nodes, {**X, "lengths": ("int64", [length])}, ["r"])
    lengths = np.arange(length) % 4
    if fits:
        program = capture(model, {"x": ROWS, "lengths": lengths})
        assert program.outputs[0].shape == ("n", 3) and worst_error(program, model) == 0
        with pytest.raises(BoundInputError, match="a value of 200 elements, got 9 for 1 at 5"):
            program(torch.ones(3, 4), torch.from_numpy(np.where(np.arange(length) == 5, 9, lengths)))
    else:
        with pytest.raises(CaptureError, match="at run time, which graphopt cannot express"):
            capture(model, {"x": ROWS, "lengths": lengths})


def test_long_constants_are_computed() -> None:
    nodes = [helper.make_node("ReduceMax", ["w"], ["m"]), helper.make_node("TopK", ["x", "m"], ["r", "p"])]
    nodes[0] = helper.make_node("ReduceMax", ["w"], ["m"], keepdims=1)
    program = capture(model_of(nodes, X, ["r"], {"w": np.arange(200) % 3}))
    assert program.outputs[0].shape == ("n", 2) and not program.bound


def test_the_size_of_a_bound_input_is_fixed() -> None:
    """Also in other inputs, which is warned of."""
    assert capture(top_k(["m"]), {"x": ROWS, "k": TWO}).inputs[1].shape == (1,)
    nodes = [helper.make_node("Expand", ["x", "s"], ["r"])]
    model = model_of(nodes, {"x": ("float32", ["rank", 1]), "s": ("int64", ["rank"])}, ["r"])
    with pytest.warns(CaptureWarning, match=r"axis 0 of input 'x' \(rank\) is 2 and nothing else: input 's', which is"):
        program = capture(model, {"x": np.ones((2, 1), np.float32), "s": np.array([2, 3])})
    assert program.inputs[0].shape == (2, 1) and program.outputs[0].shape == (2, 3) and len(program.notes) == 1


BODY_INPUTS = [
    helper.make_tensor_value_info("i", TensorProto.INT64, []),
    helper.make_tensor_value_info("before", TensorProto.BOOL, []),
    helper.make_tensor_value_info("carried", TensorProto.FLOAT, ["n", 4]),
]


def test_trips_of_a_loop() -> None:
    body = graph_of([helper.make_node("Mul", ["carried", "carried"], ["next"])], ["before", "next"], BODY_INPUTS)
    model = model_of(
        [helper.make_node("Loop", ["trips", "", "x"], ["r"], body=body)], {**X, "trips": ("int64", [])}, ["r"]
    )
    program = capture(model, {"x": ROWS, "trips": np.array(3)})
    assert program.count_operators() == 3 and program.bound["trips"].item() == 3
    with pytest.raises(CaptureError, match="number of trips of a Loop is computed from the values of input 'trips'"):
        capture(model)


def conditional(then: Any, otherwise: Any, inputs: Inputs) -> onnx.ModelProto:
    node = helper.make_node("If", ["flag"], ["r"], then_branch=then, else_branch=otherwise)
    return model_of([node], {**X, "flag": ("bool", []), **inputs}, ["r"])


def test_a_condition_is_bound_only_where_it_must_be() -> None:
    whole = graph_of([helper.make_node("Relu", ["x"], ["t"])], ["t"])
    total = graph_of([helper.make_node("ReduceSum", ["x"], ["e"], keepdims=0)], ["e"])
    other = graph_of([helper.make_node("Neg", ["x"], ["e"])], ["e"])
    examples = {"x": ROWS, "flag": np.array(True)}
    program = capture(conditional(whole, total, {}), examples)
    assert program.bound["flag"].item() is True and program.outputs[0].shape == ("n", 4)
    assert not capture(conditional(whole, other, {}), examples).bound
    with pytest.raises(CaptureError, match="must have one type and shape"):
        capture(conditional(whole, total, {}))


def test_inside_a_branch() -> None:
    wide = graph_of([helper.make_node("Tile", ["x", "s"], ["t"])], ["t"])
    same = graph_of([helper.make_node("Neg", ["x"], ["e"])], ["e"])
    model = conditional(wide, same, {"s": ("int64", [2])})
    program = capture(model, {"x": ROWS, "flag": np.array(True), "s": np.array([1, 1])})
    assert program.bound.keys() == {"s"} and len(list(program.graphs())) == 3
    assert worst_error(program, model) == 0


@pytest.mark.parametrize("name", ["s", "w"])
def test_values_from_around_a_branch(name: str) -> None:
    """An input that is cast outside, and a long constant."""
    wide = graph_of([helper.make_node("Tile", ["x", "counts"], ["t"])], ["t"])
    same = graph_of([helper.make_node("Neg", ["x"], ["e"])], ["e"])
    model = conditional(wide, same, {"s": ("int64", [200])})
    most = helper.make_node("ReduceMax", [name], ["one"], keepdims=1)
    model.graph.node.insert(0, helper.make_node("Concat", ["one", "one"], ["counts"], axis=0))
    model.graph.node.insert(0, most)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(200, np.int64), "w"))
    program = capture(model, {"x": ROWS, "flag": np.array(True), "s": np.ones(200, np.int64)})
    assert set(program.bound) == ({"s"} if name == "s" else set())
    assert worst_error(program, model) == 0


def test_checks_never_draw_another_value() -> None:
    """Not even where integers that may be masks or positions are replaced, or inputs are scaled to reach a branch."""
    wide = graph_of([helper.make_node("Tile", ["x", "s"], ["t"])], ["t"])
    same = graph_of([helper.make_node("Neg", ["x"], ["e"])], ["e"])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "most"], ["flag"]),
        helper.make_node("If", ["flag"], ["r"], then_branch=wide, else_branch=same),
    ]
    model = model_of(nodes, {**X, "s": ("int64", [2])}, ["r"], {"most": np.array(1e3, np.float32)})
    program = capture(model, {"x": ROWS, "s": np.array([1, 1])})
    drawn, skipped = draw_samples(program, seed=0)
    found, missing = search_branches(program, [case.inputs for case in drawn])
    assert found and not skipped and not missing
    assert all(case.inputs[1].tolist() == [1, 1] for case in (*drawn, *found))
    assert with_empty_masks(program, Drawn({}, program.examples)) is None
    graphopt.compile(program)
