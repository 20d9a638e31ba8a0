"""ONNX's own cases for the operators of the table: right, or refused by name; never wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

import graphopt.capture.onnx  # noqa: F401  fills the table
from graphopt import Program
from graphopt.arrays import array_of
from graphopt.capture import capture
from graphopt.capture.onnx.registry import OPERATORS
from graphopt.errors import CaptureError

SIGNED = ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
UNSIGNED = ("bool", "uint8", "uint16", "uint32", "uint64")
PLAIN = (*map(np.dtype, (*SIGNED, *UNSIGNED)), np.dtype(ml_dtypes.bfloat16))
TOLERANCES = {"float16": (3e-3, 1e-3), "bfloat16": (1e-2, 1e-2)}  # others: 1e-3, 1e-5
LEAST = 1000  # cases that are right today; a fall means operators were lost
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


def _captured(model: Any, feed: dict[str, torch.Tensor]) -> Program | None:
    """Without examples where that is possible; None where it is refused."""
    for examples in (None, feed):
        try:
            return capture(model, examples)
        except CaptureError:
            continue
    return None


def torch_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def agrees(wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> bool:
    if wanted.dtype != found.dtype or wanted.shape != found.shape:
        return False
    if wanted.dtype.kind in "biu":
        return np.array_equal(wanted, found)
    near = TOLERANCES.get(wanted.dtype.name, (1e-3, 1e-5))
    return np.allclose(wanted.astype(np.float64), found.astype(np.float64), *near, equal_nan=True)


@pytest.mark.slow
def test_no_case_is_wrong() -> None:
    right, bound, wrong = 0, 0, []
    for case in _cases():
        inputs, outputs = case.data_sets[0]
        feed = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
        given = {name: torch_tensor(np.array(value)) for name, value in feed.items()}
        program = _captured(case.model, given)
        if program is None:
            continue
        bound += bool(program.bound)
        results = program(*(given[spec.name] for spec in program.inputs))
        same = all(agrees(np.asarray(a), array_of(b)) for a, b in zip(outputs, results, strict=True))
        right += same
        wrong += [] if same else [case.name]
    assert not wrong and right > LEAST and bound > BOUND, (wrong, right, bound)
