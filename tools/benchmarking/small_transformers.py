"""Transformers small enough to be trained while one waits, and what a pass is judged by on one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.program import Program

EVALUATIONS = 10
WARM_UP = 0.05  # of all steps
WEIGHT_DECAY = 0.05
ROTARY_BASE = 1000.0

Batch = tuple[Tensor, Tensor]  # inputs and labels
Feed = tuple[dict[str, Tensor], Tensor]
Metric = Callable[[Sequence[Tensor], Tensor], float]


class Block(nn.Module):
    """x + attention(norm(x)), then x + two products with GELU between of norm(x); x is [batch, tokens, width]."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (self._by_head(made(normed)) for made in (self.query, self.key, self.value))
        if self.causal:
            q, k = rotated(q), rotated(k)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.hidden_norm(x))))
        return found

    def _by_head(self, x: Tensor) -> Tensor:
        found: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return found


def rotated(x: Tensor) -> Tensor:
    """x [batch, heads, tokens, width], its halves turned by angles that grow with the token's number.

    Su et al. 2021, "RoFormer" (arXiv 2104.09864).
    """
    half = x.shape[-1] // 2
    rates = ROTARY_BASE ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * rates
    left, right = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


@dataclass(frozen=True)
class Trained:
    """A module in evaluation mode, and its loss in nats on held-out data after equal shares of the steps."""

    module: nn.Module
    held_out: tuple[float, ...]
    steps: int
    seconds: float

    @property
    def last_gain(self) -> float:
        """By what share the loss on held-out data fell over the last fifth of the steps."""
        before = self.held_out[-1 - len(self.held_out) // 5]
        return 1 - self.held_out[-1] / before


@dataclass(frozen=True)
class Case:
    """What `graphopt.optimize` takes: the last fifth of the feeds was never trained on."""

    program: Program
    data: list[Feed]
    metric: Metric | str
    trained: Trained


def train(
    module: nn.Module, batch: Callable[[torch.Generator], Batch], held_out: Batch, *, steps: int, seed: int, rate: float
) -> Trained:
    """Train on the cross entropy of logits along the last axis, with AdamW.

    The rate goes down to 0 as the square of a cosine, so that the last fifth of the steps changes next to nothing.
    batch: draws inputs and labels, by a generator that `seed` begins.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [
        {"params": [weight for weight in module.parameters() if weight.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in module.parameters() if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98))
    losses: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        warm = min(1.0, (step + 1) / (WARM_UP * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 * (1 + math.cos(math.pi * step / steps))) ** 2
        loss = cross_entropy(module, batch(generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            with torch.no_grad():  # and without statistics of what is held out in norms
                losses.append(float(cross_entropy(module.eval(), held_out)))
            module.train()
    return Trained(module.eval(), tuple(losses), steps, time.monotonic() - began)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(module(inputs).flatten(0, -2), labels.flatten())


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` makes with PyTorch's global generator set to `seed`, which is then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
