"""A decoder's logits by other means than its own: no cache, complex rotations, heads repeated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.tools.benchmarking.llama import Layer, Llama


def recomputed(module: Llama, ids: Tensor) -> Tensor:
    """logits [batch, tokens, V] of ids [batch, tokens], with gradients."""
    shape, tokens = module.shape, ids.shape[1]
    x = module.embedding(ids)
    rates = shape.rotary_base ** (-torch.arange(0, shape.depth, 2) / shape.depth)
    turn = torch.polar(torch.ones(tokens, shape.depth // 2), torch.arange(tokens)[:, None] * rates)

    def rotate(y: Tensor) -> Tensor:
        left, right = y.chunk(2, -1)
        return torch.cat(torch.view_as_real(torch.complex(left, right) * turn).unbind(-1), -1)

    for layer in module.layers:
        assert isinstance(layer, Layer)
        attention, h = layer.attention, layer.attention_norm(x)
        q, k, v = (
            made(h).unflatten(-1, (-1, shape.depth)).transpose(1, 2)
            for made in (attention.query, attention.key, attention.value)
        )
        k, v = (y.repeat_interleave(shape.heads // shape.groups, 1) for y in (rotate(k), v))
        found = functional.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + attention.output(found.transpose(1, 2).flatten(2))
        h = layer.hidden_norm(x)
        x = x + layer.down(functional.silu(layer.gate(h)) * layer.up(h))
    logits: Tensor = module.head(module.norm(x))
    return logits
