"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import quantization, recurrent

__all__ = ["quantization", "recurrent"]
