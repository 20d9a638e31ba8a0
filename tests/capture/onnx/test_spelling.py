"""What exporters spell otherwise is imported as captured models have it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from graphopt import Program
from tests.capture.onnx.tiny import Array, imported, model_of, worst_error


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operators(program: Program) -> list[str]:
    return [
        str(node.target) for node in program.nodes() if node.op == "call_function" and "sym" not in str(node.target)
    ]


def embedded(projection: Array) -> Program:
    """Rows of a table, multiplied by `projection`."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"ids": ("int64", ["n"])}, ["y"], {"table": floats(100, 8), "w": projection})
    program = imported(model)
    assert worst_error(program, model) < 1e-6
    return program


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        (["And"], ["aten.__and__.Tensor"]),
        (["And", "Not"], ["aten.__and__.Tensor", "aten.bitwise_not.default"]),
        (["Equal", "Not"], ["aten.ne.Tensor"]),
    ],
    ids=["and", "not", "not-equal"],
)
def test_logic(nodes: list[str], wanted: list[str]) -> None:
    made = [helper.make_node(nodes[0], ["a", "b"], ["c"])]
    made += [helper.make_node(name, ["c"], ["d"]) for name in nodes[1:]]
    model = model_of(made, {"a": ("bool", ["n"]), "b": ("bool", ["n"])}, [made[-1].output[0]])
    program = imported(model)
    assert operators(program) == wanted
    assert worst_error(program, model) == 0


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([2, 2, 2], "aten.split.Tensor"), ([1, 3, 2], "aten.split_with_sizes.default")]
)
def test_split(sizes: list[int], wanted: str) -> None:
    node = helper.make_node("Split", ["x", "sizes"], ["a", "b", "c"], axis=1)
    model = model_of([node], {"x": ("float32", ["n", 6])}, ["a", "b", "c"], {"sizes": np.array(sizes)})
    program = imported(model)
    assert wanted in operators(program)
    assert worst_error(program, model) == 0


def test_a_projection_that_repeats_the_table_shares_it() -> None:
    program = embedded(floats(100, 8).T.copy())
    assert len(dict(program.graph_module.named_parameters())) == 1


def test_another_projection_is_its_own() -> None:
    program = embedded(floats(8, 100, seed=1))
    assert len(dict(program.graph_module.named_parameters())) == 2
