"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import gating, integer_elements, integer_products, quantization, recurrent

__all__ = ["gating", "integer_elements", "integer_products", "quantization", "recurrent"]
