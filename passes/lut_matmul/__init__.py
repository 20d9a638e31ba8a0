"""lut-matmul: linears and matrix products with weights of 1 to 8 bits."""

from graphopt.passes.lut_matmul.lowering import LutMatmul

__all__ = ["LutMatmul"]
