"""Put a sigmoid gate behind every attention: `insertion` the pass, `layout` the gate's axes, `account` its figures."""

from graphopt.passes.gated_attention.insertion import GatedAttention

__all__ = ["GatedAttention"]
