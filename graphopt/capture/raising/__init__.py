"""Raising: what models write out and exporters take apart becomes the composite operators of PyTorch.

A pass written for one form of a model fires on the others, and a composite has one fast kernel.
"""

from __future__ import annotations

from graphopt.capture.raising.attention import RaiseAttention
from graphopt.capture.raising.composites import RaiseComposites
from graphopt.capture.raising.decomposed_quantization import RaiseDecomposedQuantization
from graphopt.capture.raising.gelu import RaiseGelu
from graphopt.capture.raising.layer_norm import RaiseLayerNorm
from graphopt.capture.raising.recurrent import RaiseRecurrent, settled
from graphopt.contract import Pass, PassContext
from graphopt.program import Program

_COMPOSITES = (RaiseComposites(), RaiseGelu(), RaiseLayerNorm())


def raised(program: Program) -> Program:
    """A program from ONNX with linear layers, activations, norms and attention in one node each."""
    return _after(settled(program), *_COMPOSITES, RaiseAttention())


def raised_from_torch(program: Program) -> Program:
    """The same, recurrent layers and quantization, but for attention, which PyTorch's programs keep as written."""
    return _after(settled(_after(program, RaiseRecurrent())), RaiseDecomposedQuantization(), *_COMPOSITES)


def _after(program: Program, *steps: Pass) -> Program:
    for step in steps:
        program = step.run(program, PassContext()).program
    return program
