"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import gating, quantization

__all__ = ["gating", "quantization"]
