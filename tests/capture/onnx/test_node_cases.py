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
from graphopt import Program
from graphopt.capture import capture
from graphopt.capture.onnx.registry import OPERATORS
from graphopt.errors import CaptureError

PLAIN = (np.float32, np.float64, np.int64, np.int32, np.bool_)
LEAST = 900  # cases that are right today; a fall means operators were lost
BOUND = 200  # of these, cases whose inputs decide shapes, axes or counts
# PyTorch leaves open which of equal elements comes first.
TIES = ("test_top_k_same_values", "test_top_k_same_values_largest", "test_top_k_same_values_2d")


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        arrays = [value for values in case.data_sets or () for side in values for value in side]
        plain = all(isinstance(value, np.ndarray | np.generic) and value.dtype in PLAIN for value in arrays)
        if (
            case.model is not None
            and plain
            and case.name not in TIES
            and all(node.op_type in OPERATORS for node in case.model.graph.node)
        ):
            yield case


def _captured(model: Any, feed: dict[str, Any]) -> Program | None:
    """Without examples where that is possible; None where it is refused."""
    for examples in (None, {name: np.array(value) for name, value in feed.items()}):
        try:
            return capture(model, examples)
        except CaptureError:
            continue
    return None


@pytest.mark.slow
def test_no_case_is_wrong() -> None:
    right, bound, wrong = 0, 0, []
    for case in _cases():
        inputs, outputs = case.data_sets[0]
        feed = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
        program = _captured(case.model, feed)
        if program is None:
            continue
        bound += bool(program.bound)
        results = program(*(torch.from_numpy(np.array(feed[spec.name])) for spec in program.inputs))
        pairs = list(zip(outputs, results, strict=True))
        same = all(a.shape == tuple(b.shape) and np.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in pairs)
        right += same
        wrong += [] if same else [case.name]
    assert not wrong and right > LEAST and bound > BOUND, (wrong, right, bound)
