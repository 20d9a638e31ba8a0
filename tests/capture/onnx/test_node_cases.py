"""ONNX's own cases for the operators of the table: right, or refused by name; never wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

import graphopt.capture.onnx  # noqa: F401  fills the table
from graphopt.capture import capture
from graphopt.capture.onnx.registry import OPERATORS
from graphopt.errors import CaptureError

PLAIN = (np.float32, np.float64, np.int64, np.int32, np.bool_)
LEAST = 700  # cases that are right today; a fall means operators were lost


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        arrays = [value for values in case.data_sets or () for side in values for value in side]
        plain = all(isinstance(value, np.ndarray | np.generic) and value.dtype in PLAIN for value in arrays)
        if case.model is not None and plain and all(node.op_type in OPERATORS for node in case.model.graph.node):
            yield case


@pytest.mark.slow
def test_no_case_is_wrong() -> None:
    right, wrong = 0, []
    for case in _cases():
        try:
            program = capture(case.model)
        except CaptureError:
            continue
        inputs, outputs = case.data_sets[0]
        feed = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
        results = program(*(torch.from_numpy(np.array(feed[spec.name])) for spec in program.inputs))
        pairs = list(zip(outputs, results, strict=True))
        same = all(a.shape == tuple(b.shape) and np.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in pairs)
        right += same
        wrong += [] if same else [case.name]
    assert not wrong and right > LEAST, right
