"""The graphopt:: operators: what ATen cannot say."""

from graphopt.operators import (
    codebooks,
    dynamic_products,
    dynamic_quantization,
    gating,
    integer_elements,
    integer_pooling,
    integer_products,
    integer_sums,
    low_bit,
    quantization,
    recurrent,
)

__all__ = [
    "codebooks",
    "dynamic_products",
    "dynamic_quantization",
    "gating",
    "integer_elements",
    "integer_pooling",
    "integer_products",
    "integer_sums",
    "low_bit",
    "quantization",
    "recurrent",
]
