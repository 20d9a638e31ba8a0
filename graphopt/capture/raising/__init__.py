"""Raising: what models write out and exporters take apart becomes the composite operators of PyTorch.

A pass written for one form of a model fires on the others, and a composite has one fast kernel.
"""

from __future__ import annotations

from graphopt.capture.raising.attention import RaiseAttention
from graphopt.capture.raising.composites import RaiseComposites, RaiseWrittenOut
from graphopt.capture.raising.gelu import RaiseGelu
from graphopt.capture.raising.layer_norm import RaiseLayerNorm
from graphopt.contract import Pass, PassContext
from graphopt.program import Program


def raised(program: Program) -> Program:
    """A program from ONNX with linear layers, activations, norms and attention in one node each."""
    return _after(program, RaiseComposites(), RaiseGelu(), RaiseLayerNorm(), RaiseAttention())


def raised_from_torch(program: Program) -> Program:
    """A program from PyTorch with GELU and RMS norm in one node each; it has the other composites as they are."""
    return _after(program, RaiseWrittenOut())


def _after(program: Program, *steps: Pass) -> Program:
    for step in steps:
        program = step.run(program, PassContext()).program
    return program
