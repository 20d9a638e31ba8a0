"""Small networks with the shapes of stream that analyses must tell apart; each is made with its example inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.program import Program


class Residual(nn.Module):
    """x + second(relu(first(norm(x)) * gate)), pre-norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, gate: Tensor | float = 1.5) -> Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x)) * gate))


class PostNorm(Residual):
    def forward(self, x: Tensor, gate: Tensor | float = 1.5) -> Tensor:
        return self.norm(x + self.second(torch.relu(self.first(x) * gate)))


class Thresholded(Residual):
    """Makes a condition of its own inside."""

    def forward(self, x: Tensor, gate: Tensor | float = 1.5) -> Tensor:
        hidden = self.first(self.norm(x))
        return x + self.second(torch.where(hidden > 0, hidden * gate, hidden * 0.1))


class Stack(nn.Module):
    """The blocks one after the other, all with the same gate."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Gated(Stack):
    """A gate computed once from another input goes into every block."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        gate = mask.to(x.dtype).unsqueeze(-1) * 2
        for block in self.blocks:
            x = block(x, gate)
        return x


class SelfMasked(nn.Module):
    """The gate comes from the same ids as the stream: it goes around every block."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.stack = Gated(*(Residual() for _ in range(layers)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.stack(self.embed(ids), ids != 0)


class FloatMasked(nn.Module):
    """As SelfMasked, from a floating-point input."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.stack = Gated(*(Residual() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.embed(x), x.sum(-1) != 0)


class Skipped(Stack):
    """The input goes around all blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Cross(Residual):
    """Reads a memory in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.read(memory))


class EncoderDecoder(nn.Module):
    def __init__(self, encoder: int, decoder: int) -> None:
        super().__init__()
        self.encoder = Stack(*(PostNorm() for _ in range(encoder)))
        self.decoder = nn.ModuleList([Cross() for _ in range(decoder)])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(source)
        for block in self.decoder:
            target = block(target, memory)
        return target


class Towers(nn.Module):
    """Two towers of different depth that meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Stack(*(Residual() for _ in range(2)))
        self.right = Stack(*(PostNorm() for _ in range(3)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) @ self.right(right).transpose(-1, -2)


class Shared(nn.Module):
    """One block's weights in every layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.block = Residual()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = self.block(x)
        return x


class KeyValues(nn.Module):
    """Every block also returns a value from inside."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(layers)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        keys = []
        for block in self.blocks:
            assert isinstance(block, Residual)
            keys.append(block.first(block.norm(x)))
            x = x + block.second(torch.relu(keys[-1]))
        return (x, *keys)


class PerLayerTable(nn.Module):
    """Each block reads another row of one table, and makes a constant of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(layers)])
        self.table = nn.Parameter(torch.randn(layers, 16))

    def forward(self, x: Tensor) -> Tensor:
        for row, block in enumerate(self.blocks):
            x = block(x, self.table[row] * torch.arange(16).cos())
        return x


def example(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8)), generator=torch.Generator().manual_seed(0))


def example_ids() -> Tensor:
    return torch.randint(0, 20, (2, 4), generator=torch.Generator().manual_seed(0))


def captured(make: Callable[[], nn.Module], *inputs: Tensor) -> Program:
    """The program of a module, by default for one input [2, 4, 8]."""
    return capture(make().eval(), inputs or (example(),))


def gated(layers: int) -> Program:
    return captured(lambda: Gated(*(Residual() for _ in range(layers))), example(), torch.ones(2, 4, dtype=torch.int64))


def self_masked(layers: int) -> Program:
    return captured(lambda: SelfMasked(layers), example_ids())


def encoder_decoder(encoder: int, decoder: int) -> Program:
    return captured(lambda: EncoderDecoder(encoder, decoder), example(), example())


def towers() -> Program:
    return captured(Towers, example(), example())
