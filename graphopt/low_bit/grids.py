"""The grids that weights are rounded to, each by how a group of numbers gets its scale and zero, and its codes.

- affine: 2^b steps from the least number, or 0, to the largest (zero is a whole number among the codes);
- symmetric: whole numbers from -2^(b-1) to 2^(b-1) - 1, the largest magnitude on 2^(b-1) - 1;
- odd: odd multiples of s from -(2^b - 1) to 2^b - 1, without a zero (Liu et al. 2023, "OFQ", arXiv 2302.02210);
- ternary: -1, 0, 1 times the mean magnitude (Ma et al. 2024, "BitNet b1.58", arXiv 2402.17764); sign: -1, 1, likewise;
- nf4: 16 quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314), in 127ths;
- fp4: floats of 2 exponent and 1 mantissa bits, 0, 0.5, 1, 1.5, 2, 3, 4, 6, doubled; mxfp4 with powers of two as
  scales (Open Compute Project, "Microscaling formats", 1.0);
- bitmod: fp4, or with 3 bits 0, 1, 2, 4, with one of four numbers more in the place of the second zero, the best for
  each group (Chen et al. 2025, "BitMoD", arXiv 2411.11745).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.low_bit.weight import MOST_BITS

Kind = Literal["affine", "symmetric", "odd", "ternary", "sign", "nf4", "fp4", "mxfp4", "bitmod"]

_FLOATS = (0, 1, 2, 3, 4, 6, 8, 12)
_FEW_FLOATS = (0, 1, 2, 4)
_MORE = {4: (_FLOATS, (10, -10, 16, -16)), 3: (_FEW_FLOATS, (3, -3, 6, -6))}
_BITS: dict[Kind, Sequence[int]] = {
    "affine": range(1, MOST_BITS + 1),
    "symmetric": range(2, MOST_BITS + 1),
    "odd": range(1, MOST_BITS + 1),
    "ternary": (2,),
    "sign": (1,),
    "nf4": (4,),
    "fp4": (4,),
    "mxfp4": (4,),
    "bitmod": (3, 4),
}
_LEAST_SCALE = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class Steps:
    """Scale, zero and choice of a codebook for rows of numbers, each [R] or None."""

    scale: Tensor
    zero: Tensor | None = None
    tag: Tensor | None = None

    def where(self, better: Tensor, other: Steps) -> Steps:
        """`other` in the rows where `better`."""
        pairs = ((self.scale, other.scale), (self.zero, other.zero), (self.tag, other.tag))
        return Steps(*(None if new is None else torch.where(better, new, old) for old, new in pairs))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Grid:
    """A kind of grid with 2^bits numbers, of which ternary has three. Raises UsageError where there is none."""

    kind: Kind
    bits: int

    def __post_init__(self) -> None:
        if self.kind not in _BITS:
            raise UsageError(f"grid={self.kind} does not exist; give one of {', '.join(_BITS)}")
        known = _BITS[self.kind]
        if self.bits not in known:
            raise UsageError(f"grid={self.kind} has {_spelled(known)} bits, not {self.bits}")

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 if self.kind == "ternary" else (1 << self.bits) - 1

    @property
    def codebook(self) -> Tensor | None:
        """int8 [2^bits], [4, 2^bits] for bitmod, None where a code is its own value."""
        return _codebook(self.kind, self.bits)

    def steps(self, rows: Tensor, shrink: float = 1.0) -> Steps:
        """Steps for rows of float32 [R, S] whose range is `shrink` of its own; the rule of the grid for 1.

        bitmod takes the codebook with the least squared error.
        """
        if self.kind == "affine":
            low, high = (shrink * part.double() for part in (rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)))
            scale = usable((high - low) / self.highest)
            return Steps(scale, (-low / scale).round().clamp(0, self.highest).float())
        if self.kind in ("ternary", "sign"):
            size = usable(shrink * rows.double().abs().mean(1))
            return Steps(size, torch.ones_like(size)) if self.kind == "ternary" else _odd(size, 1)
        largest = shrink * rows.abs().amax(1).double()
        if self.kind == "odd":
            return _odd(usable(largest / self.highest), self.bits)
        if self.kind == "symmetric":
            half = 1 << (self.bits - 1)
            scale = usable(largest / (half - 1))
            return Steps(scale, torch.full_like(scale, half))
        if self.kind == "mxfp4":
            return Steps(_power_of_two(largest))
        if self.kind == "bitmod":
            return self._best_codebook(rows, largest)
        return Steps(usable(largest / (127 if self.kind == "nf4" else 12)))

    def _best_codebook(self, rows: Tensor, largest: Tensor) -> Steps:
        codebook = self.codebook
        assert codebook is not None
        best: Steps | None = None
        least = torch.full((len(rows),), float("inf"), dtype=rows.dtype)
        for number, book in enumerate(codebook):
            scale = usable(largest / int(book.int().abs().max()))
            tried = Steps(scale, tag=torch.full(scale.shape, number, dtype=torch.uint8))
            error = (self.numbers(self.codes(rows, tried), tried) - rows).square().sum(1)
            best = tried if best is None else best.where(error < least, tried)
            least = torch.minimum(error, least)
        assert best is not None
        return best

    def codes(self, rows: Tensor, steps: Steps) -> Tensor:
        """The codes, uint8 [R, S], of the nearest numbers of the grid."""
        value = rows / steps.scale[:, None]
        if self.codebook is None:
            assert steps.zero is not None
            return (value + steps.zero[:, None]).round().clamp(0, self.highest).to(torch.uint8)
        if steps.tag is None:
            return _nearest(value, self.kind, self.bits, None)
        found = torch.zeros(rows.shape, dtype=torch.uint8)
        for number in range(len(self.codebook)):
            own = steps.tag == number
            found[own] = _nearest(value[own], self.kind, self.bits, number)
        return found

    def numbers(self, codes: Tensor, steps: Steps) -> Tensor:
        """What codes [R, S] stand for, in float32."""
        if self.codebook is None:
            value = codes.float()
        elif steps.tag is None:
            value = self.codebook.float()[codes.int()]
        else:
            value = self.codebook.float()[steps.tag.int()[:, None], codes.int()]
        if steps.zero is not None:
            value = value - steps.zero[:, None]
        return value * steps.scale[:, None]


def _odd(half: Tensor, bits: int) -> Steps:
    return Steps(2 * half, torch.full_like(half, ((1 << bits) - 1) / 2))


def usable(scale: Tensor) -> Tensor:
    """Scales in float32: 1 where all weights are zero, never denormal."""
    return torch.where(scale > 0, scale.clamp(min=_LEAST_SCALE), 1.0).float()


def _power_of_two(largest: Tensor) -> Tensor:
    """Half of 2^(floor(log2 largest) - 2): the largest number of fp4 is 6, of which 4 has the exponent 2."""
    exponent = torch.floor(torch.log2(largest.clamp(min=_LEAST_SCALE))) - 2
    return torch.where(largest > 0, torch.exp2(exponent.clamp(-120, 120) - 1), 1.0).float()


def _nearest(value: Tensor, kind: Kind, bits: int, book: int | None) -> Tensor:
    numbers, codes = _sorted(kind, bits, book)
    between = ((numbers[1:] + numbers[:-1]) / 2).float()
    return codes[torch.bucketize(value.contiguous(), between)]


@cache
def _sorted(kind: Kind, bits: int, book: int | None) -> tuple[Tensor, Tensor]:
    """The distinct numbers of a codebook in order, float64, and the first code of each."""
    codebook = _codebook(kind, bits)
    assert codebook is not None
    numbers = (codebook if book is None else codebook[book]).tolist()
    first = {number: code for code, number in reversed(list(enumerate(numbers)))}
    order = sorted(first)
    return torch.tensor(order, dtype=torch.float64), torch.tensor([first[item] for item in order], dtype=torch.uint8)


@cache
def _codebook(kind: Kind, bits: int) -> Tensor | None:
    if kind == "nf4":
        return (127 * normal_quantiles()).round().to(torch.int8)
    if kind in ("fp4", "mxfp4"):
        return _signed(_FLOATS)
    if kind == "bitmod":
        plain, more = _MORE[bits]
        books = _signed(plain).repeat(len(more), 1)
        books[:, len(plain)] = torch.tensor(more, dtype=torch.int8)
        return books
    return None


@cache
def normal_quantiles() -> Tensor:
    """The 16 numbers of nf4 in float32, the largest magnitude being 1 (arXiv 2305.14314, appendix E)."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2  # between the quantiles of 15 and of 16 numbers
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    numbers = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return (numbers / numbers.max()).float()


def _signed(numbers: Sequence[int]) -> Tensor:
    """The sign is the highest bit; -0 is 0."""
    return torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.int8)


def _spelled(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else " or ".join(map(str, numbers))
