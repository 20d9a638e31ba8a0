"""How codes lie in memory for look-ups in one table for all outputs of a vector: half bytes with bits of four numbers.

A byte belongs to one output, plane i of it has bit i of eight neighbours of the depth: the lower half of four, the
upper half of the next four. Rows of activations are padded as for codes that are taken apart.

Layout: [panel, group, step of eight numbers, plane, block of four vectors of outputs, output of it].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backends.rules.low_bit_layout import QUAD, Layout
from graphopt.backends.sizes import Size
from graphopt.backends.target import Target

BLOCK = 4  # vectors whose outputs have a byte each in one vector
_SOME_ROWS = 4  # where their number is open
_MOST_ROWS = 8  # that share codes taken apart


@dataclass(frozen=True)
class Nibbles(Layout):
    """Codes [N, K] as halves of bytes, `vectors` being whole blocks."""

    @property
    def quads(self) -> int:
        return 2

    @property
    def together(self) -> int:
        return BLOCK

    @property
    def steps(self) -> int:
        return -(-self.apart.depth // (QUAD * self.quads))

    @property
    def apart(self) -> Layout:
        """The layout for codes that are taken apart."""
        return Layout(self.n, self.k, self.bits, self.group, self.lanes, self.vectors)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [N, K] -> [panels, groups, steps, bytes of a step], zero where N or a group ends."""
        outputs = (self.panels, self.vectors // BLOCK, BLOCK * self.lanes)
        numbers = self.spread(codes).reshape(*outputs, self.groups, self.steps, self.quads * QUAD)
        planes = [
            np.packbits(numbers >> plane & 1, axis=-1, bitorder="little")[..., 0] for plane in range(self.bits)
        ]  # [panel, block, output, group, step]
        return np.stack(planes).transpose(1, 4, 5, 0, 2, 3).reshape(self.panels, self.groups, self.steps, -1)


def instructions(target: Target, bits: int, rows: Size) -> tuple[float, float]:
    """How many a vector of weights takes for each row where exact sums are looked up, and where codes are taken apart.

    Two vectors of a plane, eight times as many numbers as bytes, are 4 halves, 8 look-ups and 4 sums of bytes, and 8
    instructions that widen and add. On x86 shuffles are what they wait for: 8 and 4 that widen, with two others each.
    Codes taken apart are shifted and masked for all rows (VPDPBUSD takes those of one row unshifted), and for each row
    multiplied: once, with VPMADDUBSW in three instructions, with SMULL in five.
    """
    neon = target.machine == "aarch64"
    looked_up = bits * (24 if neon else 36) / 16
    together = min(rows, _MOST_ROWS) if isinstance(rows, int) else _SOME_ROWS
    multiplied = 1 if target.quads else 5 if neon else 3
    shifted = 1 if target.quads and not neon and together == 1 else 1.75
    return looked_up, shifted / together + multiplied
