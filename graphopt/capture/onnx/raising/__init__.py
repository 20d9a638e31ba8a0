"""Raising: what exporters take apart becomes the composite operators that captured PyTorch models have."""

from __future__ import annotations

from graphopt.capture.onnx.raising.attention import RaiseAttention
from graphopt.capture.onnx.raising.composites import RaiseComposites
from graphopt.contract import PassContext
from graphopt.program import Program


def raised(program: Program) -> Program:
    """The program with linear layers, activations, RMS norms and attention in one node each."""
    for step in (RaiseComposites(), RaiseAttention()):
        program = step.run(program, PassContext()).program
    return program
