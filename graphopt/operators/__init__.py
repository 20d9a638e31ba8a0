"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import gating, quantization, recurrent

__all__ = ["gating", "quantization", "recurrent"]
