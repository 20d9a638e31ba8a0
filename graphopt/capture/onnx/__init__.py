"""ONNX models as Programs: every node becomes a few ATen calls, emitted directly."""

from graphopt.capture.onnx.program import from_onnx

__all__ = ["from_onnx"]
