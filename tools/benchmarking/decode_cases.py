"""The decoder of `--suite decode`, and the forms that its weights take."""

from __future__ import annotations

import torch

from graphopt.tools.benchmarking.llama import Llama, Shape

TITLE = "Llama-shaped, 24 layers"
SHAPE = Shape(layers=24, width=896, heads=14, groups=2, hidden=4864, vocabulary=32_000, length=1024, tied=True)
"""As Qwen2-0.5B, but for its vocabulary of 151 936, of which nearly all tokens of a text need a fifth."""

PASSES = {
    "float32": "O2",
    "W4": "O2,lut-matmul{bits=4}",
    "W3": "O2,lut-matmul{bits=3}",
    "W2": "O2,lut-matmul{bits=2}",
    "W1.58": "O2,lut-matmul{grid=ternary}",
    "W1": "O2,lut-matmul{grid=sign}",
}


def build(shape: Shape = SHAPE, seed: int = 0) -> Llama:
    """Normal weights whose products keep the spread of what they multiply, made one at a time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        empty = Llama(shape)
    module = empty.to_empty(device="cpu").eval()
    with torch.no_grad():
        for weight in dict.fromkeys(module.parameters()):
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
            else:
                weight.fill_(1.0)
    module.reset_buffers()
    return module
