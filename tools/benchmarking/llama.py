"""A Llama-shaped decoder that keeps keys and values in buffers, as `InferenceSession.generate` runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.program import Program


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `length` is how many positions its cache holds."""

    layers: int
    width: int
    heads: int
    groups: int  # heads of keys and values
    hidden: int
    vocabulary: int
    length: int
    rotary_base: float = 10000.0
    tied: bool = False  # the table of embeddings is also the last product's weight

    @property
    def depth(self) -> int:
        """Of a head."""
        return self.width // self.heads

    def weights(self) -> int:
        """Numbers in the products that every token passes through."""
        layer = self.width * self.depth * 2 * (self.heads + self.groups) + 3 * self.width * self.hidden
        return self.layers * layer + self.width * self.vocabulary

    def cache_bytes(self) -> int:
        """Of all keys and values of `length` positions in float32."""
        return 2 * self.layers * self.groups * self.depth * self.length * 4


class Attention(nn.Module):
    """Grouped-query attention over what was written to the cache so far."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.groups, self.depth = shape.heads, shape.groups, shape.depth
        self.query = nn.Linear(shape.width, shape.heads * shape.depth, bias=False)
        self.key, self.value = (nn.Linear(shape.width, shape.groups * shape.depth, bias=False) for _ in range(2))
        self.output = nn.Linear(shape.heads * shape.depth, shape.width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, shape.groups, shape.length, shape.depth))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], positions: Tensor, seen: Tensor) -> Tensor:
        """x [1, tokens, width], seen bool [tokens, length]: which positions a token attends to."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        q, k = turned(self._by_head(q, self.heads), turn), turned(self._by_head(k, self.groups), turn)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, self._by_head(v, self.groups))
        length = seen.shape[1]
        attended = functional.scaled_dot_product_attention(
            q, self.keys[:, :, :length], self.values[:, :, :length], attn_mask=seen, enable_gqa=True
        )
        found: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return found

    def _by_head(self, x: Tensor, heads: int) -> Tensor:
        found: Tensor = x.unflatten(-1, (heads, self.depth)).transpose(1, 2)
        return found


class Layer(nn.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.hidden_norm = (nn.RMSNorm(shape.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(shape)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], positions: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, positions, seen)
        h = self.hidden_norm(x)
        found: Tensor = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return found


class Llama(nn.Module):
    """input_ids int64 [1, tokens], positions int64 [tokens], attention_mask bool [1, length] -> logits [1, tokens, V].

    Token n is written to the cache at positions[n], and attends to those positions up to its own that the mask holds;
    no more of the cache is read than the mask is long. With `last`, logits are [1, 1, V], of the last token.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, last: bool = True) -> None:
        super().__init__()
        self.shape, self.last = shape, last
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(shape.length, shape.depth // 2))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """An empty cache, and the cosines and sines that positions turn by."""
        shape = self.shape
        rates = shape.rotary_base ** (-torch.arange(0, shape.depth, 2) / shape.depth)
        angles = torch.arange(shape.length)[:, None] * rates
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.attention.keys.zero_()
            layer.attention.values.zero_()

    def forward(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        turn = self.cos[positions], self.sin[positions]
        reach = torch.arange(attention_mask.shape[1]) <= positions[:, None]
        seen = reach & attention_mask
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, turn, positions, seen)
        x = x[:, -1:] if self.last else x
        return {"logits": self.head(self.norm(x))}


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x [1, heads, tokens, depth], its halves turned by the angles of which `turn` has cosines and sines.

    Su et al. 2021, "RoFormer" (arXiv 2104.09864).
    """
    left, right = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def capture_decoder(module: Llama, name: str = "llama") -> Program:
    """Any number of tokens after any number before; `fix_sizes(tokens=1)` makes the step of it."""
    ids, seen = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)
    sizes = {"input_ids": {1: "tokens"}, "positions": {0: "tokens"}, "attention_mask": {1: "length"}}
    return graphopt.capture(module, (ids, torch.arange(3), seen), dynamic_shapes=sizes, name=name)


def entries_of(program: Program) -> dict[str, Program]:
    """What `compile` takes."""
    return {"prefill": program, "step": program.fix_sizes(tokens=1)}
