"""Small models whose kernels for a GPU are compiled, run as loops and run emulated; "exact" ones have equal results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.operators import low_bit  # noqa: F401
from graphopt.program import Program

Made = tuple[Program, list[tuple[Tensor, ...]]]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x), -1)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.apart = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, groups=32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        return self.last(self.apart(torch.relu(self.second(x))).mean((2, 3)))


class Block(nn.Module):
    """As one of a sentence encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids)).mean(1)


class Awkward(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(2)
        return (
            nn.functional.avg_pool2d(x, 3, 2, 1),
            rows.sum(-1),
            x.amax(1),
            torch.cumsum(rows, 2),
            torch.log_softmax(x, 1),
            nn.functional.interpolate(x, scale_factor=2.0),
            rows.transpose(1, 2) * 2,
            torch.round(x * 3),
            rows.argmax(-1),
        )


class LowBit(nn.Module):
    """Sums exact in float32, so that the order of additions is all that could differ; or of `ordinary` scales."""

    def __init__(self, kinds: tuple[tuple[int, int, int, int], ...], ordinary: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.kinds, self.ordinary = kinds, ordinary
        for number, (bits, n, k, group) in enumerate(kinds):
            weight = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
            self.register_parameter(f"weight{number}", nn.Parameter(weight, False))
            scale = 2.0 ** torch.randint(-2, 2, (n, -(-k // group)), generator=draw)
            self.register_buffer(f"scale{number}", torch.rand(scale.shape, generator=draw) if ordinary else scale)
            if ordinary:
                self.register_buffer(f"zero{number}", torch.rand(scale.shape, generator=draw) * 2**bits)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for number, (bits, _, k, group) in enumerate(self.kinds):
            codes, scale, sums = torch.ops.graphopt.lut_build(x[:, :k], group)
            held = [getattr(self, f"{name}{number}", None) for name in ("weight", "scale", "zero")]
            scale = scale if self.ordinary else torch.ones_like(scale)
            found.append(torch.ops.graphopt.wq_gemm(codes, scale, sums, *held, None, None, bits, group))
        return found


class Codes(nn.Module):
    """Products of 8-bit codes; sums and what they are scaled by are exact."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, shape in (("weight", (37, 70)), ("filters", (8, 3, 3, 3))):
            codes_of = torch.randint(-127, 128, shape, generator=draw).to(torch.int8)
            self.register_parameter(name, nn.Parameter(codes_of, False))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))
        self.register_buffer("step", torch.tensor(0.5))

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        operators = torch.ops.graphopt
        a, b = (operators.quantize(v, self.one, self.zero, qmin=0, qmax=255, dtype=torch.uint8) for v in (x, image))
        rest = (None,) * 6
        made = operators.qlinear(a, self.one, self.zero, self.weight, self.step, *rest, dtype=torch.float32)
        window = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
        image = operators.qconv(b, self.one, self.zero, self.filters, self.step, *rest, **window, dtype=torch.float32)
        return made, image


LOW_BITS = ((1, 37, 100, 16), (2, 130, 70, 128), (3, 48, 256, 64), (4, 16, 256, 32), (8, 33, 256, 256))


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(1)).float()


def _of(make: Callable[[], nn.Module], *examples: Tensor, dynamic: Any = None) -> Callable[[], Made]:
    def made() -> Made:
        torch.manual_seed(0)
        return capture(make().eval(), examples, dynamic_shapes=dynamic), [examples]

    return made


def _rows() -> Made:
    """One library for any number of rows."""
    torch.manual_seed(0)
    program = capture(Mlp().eval(), (torch.randn(3, 32),), dynamic_shapes={"x": {0: "rows"}})
    return program, [(torch.randn(rows, 32),) for rows in (1, 3, 37)]


CASES: dict[str, Callable[[], Made]] = {
    "mlp": _of(Mlp, torch.linspace(-2, 2, 128).reshape(4, 32)),
    "mlp of any rows": _rows,
    "cnn": _of(Cnn, torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)),
    "block": _of(Block, torch.arange(18).reshape(2, 9)),
    "awkward": _of(Awkward, torch.linspace(-3, 3, 486).sin().reshape(2, 3, 9, 9)),
    "exact low bits": _of(lambda: LowBit(LOW_BITS), codes(1, 256)),
    "exact codes": _of(Codes, codes(5, 70), codes(1, 3 * 8 * 9).reshape(1, 3, 8, 9)),
    "low bits": _of(lambda: LowBit(LOW_BITS, ordinary=True), codes(3, 256) / 40),
    "exact low bits of rows": _of(lambda: LowBit(LOW_BITS), codes(6, 256)),
}
