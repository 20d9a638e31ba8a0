"""uint16, uint32 and uint64 in ONNX files: at the border as declared, inside as arithmetic modulo 2^n."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

import graphopt
from graphopt.capture import capture

BITS = {"uint16": 16, "uint32": 32, "uint64": 64}
Node = tuple[str, list[str], dict[str, Any]]
Arrays = dict[str, np.ndarray[Any, Any]]

ALL: dict[str, Node] = {
    "add": ("Add", ["x", "y"], {}),
    "sub": ("Sub", ["x", "y"], {}),
    "mul": ("Mul", ["x", "large"], {}),
    "chain": ("Mul", ["add", "add"], {}),
    "and": ("BitwiseAnd", ["x", "y"], {}),
    "not": ("BitwiseNot", ["x"], {}),
    "left": ("BitShift", ["x", "few"], {"direction": "LEFT"}),
    "equal": ("Equal", ["x", "y"], {}),
    "greater": ("Greater", ["x", "y"], {}),
    "less": ("LessOrEqual", ["x", "large"], {}),
    "max": ("Max", ["x", "y", "large"], {}),
    "min": ("Min", ["x", "large"], {}),
    "where": ("Where", ["greater", "x", "sub"], {}),
    "transposed": ("Transpose", ["x"], {}),
    "joined": ("Concat", ["x", "rows"], {"axis": 0}),
    "to_float": ("Cast", ["x"], {"to": TensorProto.FLOAT}),
    "to_byte": ("Cast", ["add"], {"to": TensorProto.UINT8}),
    "to_int64": ("Cast", ["sub"], {"to": TensorProto.INT64}),
    "clipped": ("Clip", ["x", "one", "middle"], {}),
    "div": ("Div", ["x", "large"], {}),
    "mod": ("Mod", ["x", "large"], {}),
    "right": ("BitShift", ["x", "few"], {"direction": "RIGHT"}),
}


def model_of(kind: str, cases: dict[str, Node]) -> ModelProto:
    """Every case as an output; x and y are [n, 4]."""
    code, high = helper.np_dtype_to_tensor_dtype(np.dtype(kind)), 2 ** BITS[kind] - 1
    flags = {"equal", "greater", "less"}
    casts = {name: node[2]["to"] for name, node in cases.items() if node[0] == "Cast"}
    types = {name: TensorProto.BOOL if name in flags else casts.get(name, code) for name in cases}
    nodes = [helper.make_node(kind, list(i), [name], **settings) for name, (kind, i, settings) in cases.items()]
    weights = {
        "large": ([4], [high, high // 2 + 1, 7, 3]),
        "rows": ([1, 4], [high, 0, 1, high // 2]),
        "few": ([4], [0, 1, 5, BITS[kind] - 1]),
        "one": ([], [1]),
        "middle": ([], [high // 2 + 2]),
    }
    graph = helper.make_graph(
        nodes,
        "unsigned",
        [helper.make_tensor_value_info(name, code, ["n", 4]) for name in "xy"],
        [helper.make_tensor_value_info(name, types[name], None) for name in cases],
        [helper.make_tensor(name, code, shape, values) for name, (shape, values) in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feed_of(kind: str) -> Arrays:
    generator, high = np.random.default_rng(0), 2 ** BITS[kind] - 1
    x, y = (generator.integers(0, high, (5, 4), dtype=kind, endpoint=True) for _ in range(2))
    x[0], y[0] = [high, 0, 1, high // 2 + 1], [1, high, 1, high // 2 + 1]
    return {"x": x, "y": y}


@pytest.mark.parametrize("kind", BITS)
def test_a_compiled_model_computes_what_the_standard_says(kind: str) -> None:
    model, feed = model_of(kind, ALL), feed_of(kind)
    program = capture(model, {name: torch.from_numpy(array) for name, array in feed.items()})
    assert {str(spec.dtype) for spec in program.inputs} == {f"torch.{kind}"}
    session = graphopt.compile(program, threads=1).session()
    assert {item.type for item in session.get_inputs()} == {f"tensor({kind})"}
    with np.errstate(over="ignore"):
        wanted = ReferenceEvaluator(model).run(None, feed)
    for spec, found, want in zip(program.outputs, session.run(None, feed), wanted, strict=True):
        assert found.dtype == want.dtype, spec.name
        np.testing.assert_array_equal(found, want, err_msg=spec.name)


def test_casts_to_an_unsigned_type_wrap_around() -> None:
    """So do those of constants, which are folded."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.UINT32),
        helper.make_node("Cast", ["c"], ["b"], to=TensorProto.UINT32),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["back"], to=TensorProto.INT64),
    ]
    graph = helper.make_graph(
        nodes,
        "casts",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [3])],
        [
            helper.make_tensor_value_info("sum", TensorProto.UINT32, [3]),
            helper.make_tensor_value_info("back", TensorProto.INT64, [3]),
        ],
        [helper.make_tensor("c", TensorProto.INT32, [], [-1])],
    )
    program = capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    found, back = graphopt.compile(program, threads=1).session().run(None, {"x": np.array([-1, 2**40 + 5, 0])})
    assert found.dtype == np.uint32
    assert found.tolist() == back.tolist() == [2**32 - 2, 4, 2**32 - 1]


def test_unsigned_types_of_a_torch_module() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            wide = x.to(torch.int32) * 3
            return wide.to(torch.uint16), x.reshape(2, 2).t()

    x = torch.tensor([1, 2, 30000, 65535], dtype=torch.uint16)
    program = capture(Module(), (x,))
    found, moved = graphopt.compile(program, threads=1).session().run(None, {"x": x.numpy()})
    assert found.dtype == moved.dtype == np.uint16
    assert found.tolist() == [3, 6, 90000 % 65536, 65533]
    assert moved.tolist() == [[1, 30000], [2, 65535]]
