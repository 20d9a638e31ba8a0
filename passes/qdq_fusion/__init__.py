"""Quantized programs on their codes: `products`, `elements` between them, and `survivors`, what is left."""

from graphopt.passes.qdq_fusion.fusion import QDQFusion

__all__ = ["QDQFusion"]
