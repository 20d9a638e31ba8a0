"""Small ONNX models written down with onnx.helper, and their answers from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from graphopt import Program
from graphopt.capture import capture
from graphopt.capture.inputs import check_sizes, draw_inputs

Array = np.ndarray[Any, Any]
DTYPES = {np.dtype(name).name: helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in ("f4", "i8", "i4", "bool")}


def model_of(
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[str, Sequence[int | str]]],
    outputs: Sequence[str],
    weights: dict[str, Array] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """inputs: {name: (dtype, shape)}; the outputs' types are left for inference."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(name, DTYPES[dtype], shape) for name, (dtype, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model if any(node.domain for node in nodes) else onnx.shape_inference.infer_shapes(model)


def worst_error(program: Program, model: onnx.ModelProto | str, seed: int = 1) -> float:
    """Largest difference from ONNX Runtime relative to the largest value, over all sizes the program is checked at."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options)
    worst = 0.0
    for sizes in check_sizes(program):
        values = draw_inputs(program, sizes, seed)
        feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, values, strict=True)}
        for theirs, ours in zip(session.run(None, feed), program(*values), strict=True):
            assert theirs.shape == tuple(ours.shape) and str(theirs.dtype) == str(ours.dtype).removeprefix("torch.")
            same = (theirs == ours.numpy()) | (np.isnan(theirs) if theirs.dtype.kind == "f" else False)
            gap = np.where(same, 0.0, np.abs(theirs.astype(np.float64) - ours.numpy().astype(np.float64)))
            finite = np.abs(theirs[np.isfinite(theirs)]) if theirs.dtype.kind == "f" else np.abs(theirs.astype(float))
            worst = max(worst, float(gap.max(initial=0.0)) / max(float(finite.max(initial=0.0)), 1e-6))
    return worst


def imported(model: onnx.ModelProto) -> Program:
    return capture(model)
