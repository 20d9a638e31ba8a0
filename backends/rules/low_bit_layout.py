"""How codes of 1 to 8 bits lie in memory for kernels that take them apart, `bits` bits each.

A number of bits is a sum of parts of 8, 4, 2 and 1: 3 bits are 2 and 1. A word of 32 bits belongs to one output, its
four bytes to four neighbours of the depth (a quad), and a byte has 8 / part fields, one a quad: one instruction that
multiplies quads takes a vector of words in which all fields but one are zero. A step holds whole blocks of every part
for all outputs of a panel; panels, groups and steps follow each other, so that a kernel reads memory from its begin to
its end. In groups of up to 16 numbers a step has four quads, and fields that are left belong to the next outputs.

In planes every part has one bit, and 16 neighbours are turned: byte j of a word, whose bits are the same byte of four
quads, has numbers 4 j to 4 j + 3. Half a byte is then the number of an entry of graphopt::lut_build's tables.

Layout of one part: [panel, group, step, block of quads, vector of outputs, output of it, byte of the quad].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

QUAD = 4  # neighbours of the depth in a word
TURNED = QUAD * QUAD  # numbers of the depth that planes turn
_FEW = 16  # of a group whose steps are half as long


@dataclass(frozen=True)
class Part:
    """`bits` of each code, from bit `place` on."""

    bits: int
    place: int

    @property
    def fields(self) -> int:
        """Of a byte."""
        return 8 // self.bits


@dataclass(frozen=True)
class Field:
    """Where the bits of a part lie: at bit `position` of the words of `vector`, a number among those of the part."""

    part: Part
    vector: int
    position: int


@dataclass(frozen=True)
class Layout:
    """Codes [N, K] of `bits` in groups of `group`, packed for panels of `vectors` times `lanes` outputs."""

    n: int
    k: int
    bits: int
    group: int
    lanes: int
    vectors: int
    planes: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.planes:
            return tuple(Part(1, place) for place in range(self.bits))
        found, place = [], 0
        for bits in (8, 4, 2, 1):
            if self.bits & bits:
                found.append(Part(bits, place))
                place += bits
        return tuple(found)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def outputs(self) -> int:
        """Of a panel."""
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        return -(-self.n // self.outputs)

    @property
    def quads(self) -> int:
        """Of a step."""
        return min(max(part.fields for part in self.parts), 4 if min(self.group, self.k) <= _FEW else 8)

    @property
    def steps(self) -> int:
        """Of a group."""
        return -(-min(self.group, self.k) // (QUAD * self.quads))

    @property
    def depth(self) -> int:
        """Numbers of a group, those included that fill its last step."""
        return self.steps * self.quads * QUAD

    @property
    def packed_k(self) -> int:
        """What rows of activations have to be padded to, each group to `depth`."""
        return self.groups * self.depth

    @property
    def step_vectors(self) -> int:
        """Vectors of words that a step of a panel has."""
        return self.vectors * self.quads * self.bits // 8

    @property
    def together(self) -> int:
        """Vectors of outputs that share words of the narrowest part: `vectors` is a multiple of it."""
        return max(part.fields // min(part.fields, self.quads) for part in self.parts)

    def fields(self, quad: int, vector: int) -> Iterator[Field]:
        """Where the parts of the codes of one quad of a step lie, for one vector of outputs of a panel."""
        start = 0
        for part in self.parts:
            each = min(part.fields, self.quads)  # quads of a block
            sharing = part.fields // each
            block, number = divmod(quad, each)
            place = block * (self.vectors // sharing) + vector // sharing
            yield Field(part, start + place, part.bits * (vector % sharing * each + number))
            start += self.quads // each * (self.vectors // sharing)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [N, K] -> [panels, groups, steps, words of a step * 4], zero where N or a group ends."""
        spread = self.spread(codes).reshape(
            self.panels, self.vectors, self.lanes, self.groups, self.steps, self.quads, QUAD
        )
        shape = (self.panels, self.groups, self.steps, -1)
        found = []
        for part in self.parts:
            each = min(part.fields, self.quads)
            sharing = part.fields // each
            inner = (self.vectors // sharing, sharing, self.lanes, self.groups, self.steps, self.quads // each, each)
            bits = (spread >> part.place & (1 << part.bits) - 1).reshape(self.panels, *inner, QUAD)
            words = np.zeros_like(bits[:, :, 0, ..., 0, :])  # [panel, vector, lane, group, step, block, byte]
            for vector in range(sharing):
                for number in range(each):
                    words |= bits[:, :, vector, ..., number, :] << part.bits * (vector * each + number)
            found.append(words.transpose(0, 3, 4, 5, 1, 2, 6).reshape(shape))
        return np.concatenate(found, axis=-1)

    def spread(self, codes: np.ndarray) -> np.ndarray:
        """[N, K] -> [panels * outputs, packed_k], zero where N or a group ends, in the order of the quads."""
        n, k = codes.shape
        size = min(self.group, k)
        padded = np.pad(codes, ((0, self.panels * self.outputs - n), (0, self.groups * size - k)))
        groups = padded.reshape(-1, self.groups, size)
        spread = np.pad(groups, ((0, 0), (0, 0), (0, self.depth - size)))
        if self.planes:
            spread = spread.reshape(-1, QUAD, QUAD).transpose(0, 2, 1)
        return spread.reshape(len(padded), self.packed_k)

    def pack_groups(self, numbers: np.ndarray) -> np.ndarray:
        """What each output has for each group, [N, G] -> [panels, G, outputs], zero where N ends."""
        padded = np.pad(numbers, ((0, self.panels * self.outputs - len(numbers)), (0, 0)))
        return np.ascontiguousarray(padded.reshape(self.panels, self.outputs, self.groups).transpose(0, 2, 1))
