from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.capture.onnx.test_external_data import external
from tests.capture.onnx.tiny import model_of
from tests.tools.conftest import Cli


@pytest.fixture
def strange(tmp_path: Path) -> str:
    """Everything that can be wrong at once: operators, in a branch too, attributes, element types."""
    node = helper.make_node
    then = helper.make_graph(
        [node("Sparkle", ["e"], ["h"], name="second", domain="com.example"), node("Relu", ["h"], ["t"])],
        "then",
        [],
        [onnx.ValueInfoProto(name="t")],
    )
    other = helper.make_graph([node("Relu", ["e"], ["o"])], "otherwise", [], [onnx.ValueInfoProto(name="o")])
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="look"),
        node("Sparkle", ["e"], ["b"], name="first", domain="com.example"),
        node("Relu", ["b"], ["c"], name="behind"),
        node("Softmax", ["e"], ["s"], name="soft", axis=1.5),
        node("Relu", ["e"], ["q"], name="odd", slope=0.1),
        node("Elu", ["q"], ["z"], name="after_odd", slope=0.1),
        node("Add", ["z", "bad"], ["sum"], name="sum"),
        node("If", ["yes"], ["f"], name="cond", then_branch=then, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        helper.make_tensor_value_info("text", TensorProto.STRING, ["n"]),
    ]
    tensors = [
        numpy_helper.from_array(np.ones((100, 4), np.float32), "table"),
        TensorProto(name="bad", data_type=TensorProto.COMPLEX64, dims=[4], raw_data=bytes(32)),
    ]
    outputs = [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["n", 4])]
    declared = [helper.make_tensor_value_info("q", TensorProto.FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "strange", inputs, outputs, tensors, value_info=declared)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 3)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "strange.onnx")
    return str(tmp_path / "strange.onnx")


def test_all_that_is_wrong_is_shown_at_once(cli: Cli, strange: str) -> None:
    outcome = cli("inspect", strange)
    assert outcome.code == 2 and "com.example.Sparkle (first, second)" in outcome.err
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["ids", "int64", "n", "ids", "0..99"] in lines and ["yes", "bool", "scalar", "mask"] in lines
    for words in ("IR version 10, opsets onnx 20, com.example 3", "com.example.Sparkle 2", "float: 400 in 1 tensors"):
        assert words in outcome.out, words


def test_the_same_as_json(cli: Cli, strange: str) -> None:
    report = cli("inspect", strange, "--json").json["file"]
    missing = {row["operator"]: row["nodes"] for row in report["operators"] if not row["imported"]}
    assert missing == {"com.example.Sparkle": 2}
    assert [problem["where"] for problem in report["problems"]] == [
        "input 'text'",
        "tensor 'bad'",
        "com.example.Sparkle 'first'",
        "Softmax 'soft'",
        "Relu 'odd'",
        "Elu 'after_odd'",
        "com.example.Sparkle 'second'",
    ]
    assert "'slope' is not imported" in report["problems"][5]["why"]
    assert report["nodes_behind_them"] == 3
    assert report["inputs"][2] == {"name": "text", "dtype": "string", "shape": ["n"], "domain": "unknown"}
    assert report["outputs"] == [{"name": "c", "dtype": "float", "shape": ["n", 4]}]
    assert report["tensors"][0] == {"dtype": "float", "tensors": 1, "elements": 400, "bytes": 1600}


def test_a_file_that_is_imported_shows_the_program_too(cli: Cli, tmp_path: Path) -> None:
    onnx.save(
        model_of([helper.make_node("Relu", ["x"], ["r"])], {"x": ("float32", ("n", 4))}, ["r"]), tmp_path / "m.onnx"
    )
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 0 and "opsets onnx 20" in outcome.out and "aten.relu.default" in outcome.out
    assert "Relu 1" in outcome.out and "not imported" not in outcome.out
    report = cli("inspect", tmp_path / "m.onnx", "--json", "--blocks").json
    assert report["file"]["ir_version"] == 10 and report["inputs"][0]["domain"] == "any" and report["repeats"] == []


def test_files_beside_the_model(cli: Cli, tmp_path: Path) -> None:
    model = model_of([helper.make_node("Gather", ["w", "ids"], ["r"])], {"ids": ("int64", ("n",))}, ["r"])
    model.graph.initializer.append(external("w", [512, 4], "w.data"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "w.data").write_bytes(bytes(8192))
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 0 and "beside   w.data: 1 tensors, 8.0 kB" in outcome.out and "ids 0..511" in outcome.out
    (tmp_path / "w.data").unlink()
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 2 and "tensor 'w'" in outcome.out and "does not exist beside the model" in outcome.err


@pytest.mark.parametrize("opset", [5, None])
def test_opsets_that_are_not_imported(cli: Cli, tmp_path: Path, opset: int | None) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["r"])], {"x": ("float32", (4,))}, ["r"], opset=opset or 20)
    if opset is None:
        del model.opset_import[:]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 2 and "opset" in outcome.err and "the model" in outcome.out


def test_a_damaged_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 40)
    cli("inspect", tmp_path / "m.onnx").refused("m.onnx is no ONNX model, or is damaged")
