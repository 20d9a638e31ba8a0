"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import quantization

__all__ = ["quantization"]
