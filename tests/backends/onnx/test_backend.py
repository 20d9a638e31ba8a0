"""The interface that ONNX asks of a backend, eager and compiled."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep as OnnxBackendRep
from onnx.backend.test import BackendTest

import graphopt.backends.onnx as backend
from graphopt.errors import CaptureError, FeedError, UsageError
from tests.capture.onnx.tiny import model_of

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def doubled() -> onnx.ModelProto:
    return model_of([helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("float32", ["n", 3])}, ["y"])


def reshaped() -> onnx.ModelProto:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    return model_of(nodes, {"x": ("float32", [2, 3]), "shape": ("int64", [2])}, ["y"])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_prepared_once_and_run_often(compiled: bool, tmp_path: Path) -> None:
    prepared = backend.prepare(doubled(), compiled=compiled, database=tmp_path / "none.jsonl")
    assert isinstance(prepared, OnnxBackendRep) and issubclass(backend.Backend, OnnxBackend)
    for rows in (X, X[:1]):
        outputs: Any = prepared.run([rows])
        assert np.array_equal(outputs["y"], rows * 2) and outputs[0] is outputs["y"]
    assert np.array_equal(prepared.run({"x": X})[0], X * 2)
    with pytest.raises(FeedError, match="takes 1 inputs, got 2"):
        prepared.run([X, X])
    with pytest.raises(FeedError, match="no option 'verbose'"):
        prepared.run([X], verbose=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_that_decide_shapes_may_change_from_run_to_run(compiled: bool, tmp_path: Path) -> None:
    prepared = backend.prepare(reshaped(), compiled=compiled, database=tmp_path / "none.jsonl")
    for shape in ([3, 2], [6, 1], [1, 6]):
        (result,) = prepared.run([X, np.array(shape)])
        assert np.array_equal(result, X.reshape(shape))


def test_what_is_refused_is_refused_where_it_can_be_known() -> None:
    unknown = model_of([helper.make_node("StringNormalizer", ["x"], ["y"])], {"x": ("float32", [2, 3])}, ["y"])
    unknown.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3]))
    assert backend.is_compatible(doubled()) and not backend.is_compatible(doubled(), "CUDA")
    assert not backend.is_compatible(unknown)
    with pytest.raises(CaptureError, match="StringNormalizer"):
        backend.run_model(unknown, [X])
    with pytest.raises(UsageError, match="not on 'CUDA:0'"):
        backend.prepare(doubled(), "CUDA:0")
    with pytest.raises(UsageError, match="unknown option 'optimized'"):
        backend.prepare(doubled(), optimized=True)
    with pytest.raises(onnx.checker.ValidationError):
        backend.prepare(onnx.ModelProto())


def test_one_node_runs_by_itself() -> None:
    node = helper.make_node("Clip", ["x", "", "high"], ["y"])
    (result,) = backend.run_node(node, [X, np.float32(2)])
    assert np.array_equal(result, X.clip(None, 2))
    (older,) = backend.run_node(helper.make_node("Softmax", ["x"], ["y"]), [X], opset_version=13)
    assert np.allclose(older.sum(-1), 1)
    (told,) = backend.run_node(node, [X, np.float32(2)], outputs_info=[(np.dtype("f4"), (2, 3))])
    assert np.array_equal(told, result)
    with pytest.raises(UsageError, match="reads 2 inputs, got 1"):
        backend.run_node(node, [X])


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_comes_back_as_it_is_declared(compiled: bool, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2, 3])
    result = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2, 3])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = X.astype(ml_dtypes.bfloat16)
    (found,) = backend.run_model(model, [x], compiled=compiled, database=tmp_path / "none.jsonl")
    assert found.dtype == x.dtype and np.array_equal(found, -x)


@pytest.mark.parametrize(
    "kind", ["INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"]
)
def test_numbers_of_few_bits_come_and_go_as_they_are_declared(kind: str) -> None:
    code = getattr(TensorProto, kind)
    values = [helper.make_tensor_value_info(name, code, [2, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Transpose", ["x"], ["y"], perm=[0, 1])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    x = np.array([[1, 0.5, 1], [1, 1, 0.5]]).astype(helper.tensor_dtype_to_np_dtype(code))
    (found,) = backend.run_model(model, [x])
    assert found.dtype == x.dtype and np.array_equal(found, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # numpy's, of tests about infinities
def test_the_runner_of_onnx_takes_it() -> None:
    tests = BackendTest(backend.Backend, __name__)
    tests.include("^test_(relu|softmax_axis_1|reshape_one_dim)_cpu$")
    suite = tests.test_suite
    found = unittest.TestResult()
    suite.run(found)
    ran = found.testsRun - len(found.skipped)
    assert found.wasSuccessful() and ran == 3, (found.errors, found.failures, ran)
