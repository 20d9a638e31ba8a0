"""Optional values, each either a tensor or left out."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Known, Present, Value, known


@operator("Optional")
def optional(op: Operation, value: Value = None) -> Value:
    op.attributes.ignore("type")
    return value


@operator("OptionalHasElement")
def has_element(op: Operation, value: Value = None) -> Known:
    return known(value is not None, torch.bool)


@operator("OptionalGetElement")
def get_element(op: Operation, value: Present) -> Present:
    return value
