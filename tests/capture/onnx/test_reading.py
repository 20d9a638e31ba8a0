"""Files that nobody vouches for: walked through in a limited child before protobuf parses them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.capture import Limits, capture
from graphopt.errors import CaptureError
from graphopt.untrusted import child
from graphopt.untrusted.onnx_file import MOST_BYTES, check_file
from tests.capture.onnx.mutations import sound
from tests.capture.onnx.tiny import model_of


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def check(tmp_path: Path, content: bytes, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
    (tmp_path / "m.onnx").write_bytes(content)
    check_file(tmp_path / "m.onnx", tmp_path, limits)


def refused(tmp_path: Path, content: bytes, words: str, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
    with pytest.raises(CaptureError, match=words) as caught:
        check(tmp_path, content, limits)
    assert str(caught.value).startswith(str(tmp_path / "m.onnx")) and "\n" not in str(caught.value)


def test_sound_files_pass(tmp_path: Path) -> None:
    check(tmp_path, sound().SerializeToString(), Limits(max_nodes=20))
    check(tmp_path, b"")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff" * 40, id="a number without end"),
        pytest.param(field(7, b"")[:1], id="no length"),
        pytest.param(varint(7 << 3 | 2) + varint(9) + b"short", id="beyond the end"),
        pytest.param(field(7, field(1, b"abc")), id="text in place of a node"),
        pytest.param(varint(7 << 3 | 3), id="a group"),
        pytest.param(field(7, field(5, b"\x0d\x00")), id="half a number of four bytes"),
        pytest.param(field(0, b""), id="field 0"),
    ],
)
def test_what_is_no_message(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content, "is no ONNX model, or is damaged")


def nested(levels: int) -> bytes:
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))  # a node with an attribute with a graph
    return field(7, graph)


def test_graphs_within_graphs(tmp_path: Path) -> None:
    """As deep as protobuf reads, and no deeper."""
    check(tmp_path, nested(32))
    onnx.load_model_from_string(nested(32))
    refused(tmp_path, nested(33), "deeper than protobuf reads")
    refused(tmp_path, nested(500), "deeper than protobuf reads")


def test_many_nodes_in_few_bytes(tmp_path: Path) -> None:
    refused(
        tmp_path, field(7, field(1, b"") * 100_000), r"over 1000 nodes; raise Limits\.max_nodes", Limits(max_nodes=1000)
    )
    check(tmp_path, field(7, field(1, b"") * 1000), Limits(max_nodes=1000))


def test_many_fields_in_few_bytes(tmp_path: Path) -> None:
    content = field(7, field(5, b"\x08\x00" * 5000))  # an initializer with 5000 axes
    refused(tmp_path, content, r"over 1000 fields, 100 for each.*raise Limits\.max_nodes", Limits(max_nodes=10))
    check(tmp_path, content, Limits(max_nodes=51))


def test_numbers_that_grow_in_memory(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.INT64, dims=[100_000], int64_data=[7] * 100_000)
    content = field(7, field(5, tensor.SerializeToString()))
    refused(tmp_path, content, r"raise Limits\.max_constant_bytes", Limits(max_constant_bytes=600_000))
    check(tmp_path, content, Limits(max_constant_bytes=700_000))
    tensor = TensorProto(name="w", data_type=TensorProto.INT64, dims=[100_000], int64_data=[1 << 62] * 100_000)
    check(tmp_path, field(7, field(5, tensor.SerializeToString())), Limits(max_constant_bytes=600_000))


def test_a_file_is_walked_through_by_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = "assert not {'torch', 'numpy', 'onnx', 'google'} & set(sys.modules)"
    monkeypatch.setattr(child, "_START", f"{child._START}; {ending}; open({str(tmp_path / 'lean')!r}, 'w')")
    (tmp_path / "m.onnx").write_bytes(sound().SerializeToString())
    assert capture(tmp_path / "m.onnx").inputs[0].name == "x"
    assert (tmp_path / "lean").exists()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_nodes=3), r"Limits\.max_nodes"),
        (Limits(max_bytes=100), r"Limits\.max_bytes"),
        (Limits(max_parse_bytes=1 << 20), "ended with exit code"),
    ],
)
def test_limits_reach_the_child(tmp_path: Path, limits: Limits, words: str) -> None:
    (tmp_path / "m.onnx").write_bytes(sound().SerializeToString())
    with pytest.raises(CaptureError, match=words):
        capture(tmp_path / "m.onnx", limits=limits)


def test_a_file_larger_than_the_child_may_be(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CaptureError, match=r"raise Limits\.max_parse_bytes"):
        capture(tmp_path / "m.onnx", limits=Limits(max_parse_bytes=1 << 28))
    (tmp_path / "m.onnx").unlink()


def test_no_onnx_file_is_larger_than_a_message(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CaptureError, match=r"no ONNX file has over 2147483647; save its weights beside it"):
        capture(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").unlink()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(CaptureError, match=r"m\.onnx is no file"):
        capture(tmp_path / "m.onnx")


def own_functions(count: int, calls: int, constant: int = 0) -> onnx.ModelProto:
    """`count` functions, each of which calls the one before `calls` times."""
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    first = [helper.make_node("Neg", ["a"], ["b"])]
    if constant:
        value = numpy_helper.from_array(np.zeros(constant, np.uint8))
        first.append(helper.make_node("Constant", [], ["unread"], value=value))
    functions = [helper.make_function("own", "f0", ["a"], ["b"], first, versions)]
    for index in range(1, count):
        names = ["a", *(f"t{place}" for place in range(calls - 1)), "b"]
        nodes = [
            helper.make_node(f"f{index - 1}", [names[place]], [names[place + 1]], domain="own")
            for place in range(calls)
        ]
        functions.append(helper.make_function("own", f"f{index}", ["a"], ["b"], nodes, versions))
    node = helper.make_node(f"f{count - 1}", ["x"], ["r"], domain="own")
    model = model_of([node], {"x": ("float32", (2,))}, ["r"])
    model.functions.extend(functions)
    model.opset_import.append(versions[1])
    return model


def test_functions_are_written_out_within_the_limits() -> None:
    assert capture(own_functions(4, 2)).count_operators() == 8
    with pytest.raises(
        CaptureError, match=r"1099511627776 nodes with its own functions written out.*Limits\.max_nodes"
    ):
        capture(own_functions(41, 2))
    with pytest.raises(CaptureError, match=r"bytes with its own functions written out.*raise Limits\.max_graph_bytes"):
        capture(own_functions(6, 2, constant=10_000), limits=Limits(max_graph_bytes=300_000))
    assert capture(own_functions(6, 2, constant=10_000), limits=Limits(max_graph_bytes=400_000)).outputs


def test_functions_that_call_one_another_deep_or_in_a_circle() -> None:
    with pytest.raises(CaptureError, match="over 100 deep"):
        capture(own_functions(5000, 1))
    model = own_functions(2, 1)
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "f1", "own"
    with pytest.raises(CaptureError, match="calls itself"):
        capture(model)
