"""Import is linear in nodes, in calls and in memory; `-m slow -k import_scale -s` prints the seconds too."""

from __future__ import annotations

import sys
import time
import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.capture import capture
from tests.test_scale import calls_in, check_linear

WIDTH = 4


def residual_chain(nodes: int) -> onnx.ModelProto:
    """Residual blocks of eight nodes, two of them shape arithmetic, on [n, WIDTH]."""
    rng = np.random.default_rng(0)
    made, weights, last = [], [], "x"
    for block in range(nodes // 8):
        for name, shape in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,))):
            held = rng.standard_normal(shape).astype(np.float32)
            weights.append(numpy_helper.from_array(held, f"{name}{block}"))
        for operator, inputs, output in (
            ("MatMul", [last, "w"], "m"),
            ("Add", ["m", "b"], "a"),
            ("Relu", ["a"], "r"),
            ("Shape", ["r"], "s"),
            ("Reshape", ["r", "s"], "v"),
            ("Sigmoid", ["v"], "g"),
            ("Mul", ["v", "g"], "p"),
            ("Add", ["p", last], "o"),
        ):
            named = [name if name == last else f"{name}{block}" for name in inputs]
            made.append(helper.make_node(operator, named, [f"{output}{block}"], name=f"{operator}{block}"))
        last = f"o{block}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", last)]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def peak(model: onnx.ModelProto) -> int:
    """Bytes that Python holds at most while the model is imported."""
    tracemalloc.start()
    capture(model)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_calls_and_memory_are_linear() -> None:
    capture(residual_chain(80))  # what is only done once in a process
    small, large = residual_chain(400), residual_chain(1600)
    check_linear(calls_in(lambda: capture(small), "400 nodes"), calls_in(lambda: capture(large), "1600 nodes"), 4)
    check_linear(peak(small), peak(large), 4)


@pytest.mark.slow
def test_fifty_thousand_nodes() -> None:
    seconds, kept = {}, {}
    for nodes in (10_000, 40_000, 50_000):
        model = residual_chain(nodes)
        start = time.process_time()
        program = capture(model)
        seconds[nodes] = time.process_time() - start
        kept[nodes] = program.count_operators()
        print(f"{nodes} nodes imported in {seconds[nodes]:.1f} s of processor time", file=sys.stderr)
    # Of eight nodes five are left: linear with its bias, relu, the view, silu and the sum.
    assert kept == {nodes: nodes // 8 * 5 + 1 for nodes in kept}
