"""A weight in few bits: codes, and the numbers that they stand for.

    w[n, k] = scale[n, k // group] * (value(q) - zero[n, k // group]),  q = codes[n, k]

value(q) is q itself or an entry of a codebook. Every grid is spelled this way: an affine one has a whole or fractional
zero, odd multiples of s have scale 2s and zero (2^bits - 1) / 2, ternary codes 0, 1, 2 have zero 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import UsageError

LEAST_GROUP = 16
MOST_BITS = 8


@dataclass(frozen=True, eq=False)
class LowBitWeight:
    """`codes` uint8 [N, K] below 2^bits, a byte each; `scale` float32 [N, G] with G = ceil(K / group).

    `group` is 16 to K; the last one of a row may be short. `zero` is float32 [N, G]. `codebook` is int8 [2^bits], or
    int8 [C, 2^bits] of which `tag`, uint8 [N, G], says each group's own. With `permutation`, int64 [K], column j of
    the codes multiplies x[permutation[j]]. Raises UsageError for anything else.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group: int
    zero: Tensor | None = None
    codebook: Tensor | None = None
    tag: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise UsageError(f"a low-bit weight has 1 to {MOST_BITS} bits, not {self.bits}")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or not self.codes.numel():
            raise UsageError(f"codes of a low-bit weight are uint8 [N, K], not {_spelled(self.codes)}")
        least = min(LEAST_GROUP, self.columns)
        if not least <= self.group <= self.columns:
            raise UsageError(
                f"group={self.group} of a low-bit weight with {self.columns} columns must be {least} to {self.columns}"
            )
        if int(self.codes.max()) >> self.bits:
            raise UsageError(f"code {int(self.codes.max())} of a low-bit weight does not fit {self.bits} bits")
        _check("scale", self.scale, torch.float32, (self.rows, self.groups))
        if self.zero is not None:
            _check("zero", self.zero, torch.float32, (self.rows, self.groups))
        if not all(bool(item.isfinite().all()) for item in (self.scale, self.zero) if item is not None):
            raise UsageError("scale and zero of a low-bit weight are finite; this one has infinities or NaN")
        self._check_codebook()
        if self.permutation is not None:
            _check("permutation", self.permutation, torch.int64, (self.columns,))
            if not torch.equal(self.permutation.sort().values, torch.arange(self.columns)):
                raise UsageError(f"permutation of a low-bit weight does not name each of {self.columns} columns once")

    def _check_codebook(self) -> None:
        if self.codebook is None:
            if self.tag is not None:
                raise UsageError("tag of a low-bit weight chooses among codebooks; give codebook [C, 2^bits]")
            return
        count = 1 << self.bits
        if self.tag is None:
            _check("codebook", self.codebook, torch.int8, (count,))
            return
        if self.codebook.dim() != 2 or not len(self.codebook):
            raise UsageError(
                f"codebook of a low-bit weight with tags is int8 [C, 2^bits], not {_spelled(self.codebook)}"
            )
        _check("codebook", self.codebook, torch.int8, (len(self.codebook), count))
        _check("tag", self.tag, torch.uint8, (self.rows, self.groups))
        if int(self.tag.max()) >= len(self.codebook):
            raise UsageError(
                f"tag {int(self.tag.max())} of a low-bit weight names none of {len(self.codebook)} codebooks"
            )

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group)

    @property
    def bytes(self) -> int:
        """Of packed codes, scales and zeros, tags and codebook, as a compiled artifact holds them in float32."""
        parts = (self.scale, self.zero, self.codebook, self.tag)
        return -(-self.codes.numel() * self.bits // 8) + sum(item.nbytes for item in parts if item is not None)

    @property
    def bits_a_weight(self) -> float:
        return 8 * self.bytes / self.codes.numel()

    def values(self) -> Tensor:
        """value(q) of every code, [N, K]: uint8, or int8 where there is a codebook."""
        if self.codebook is None:
            return self.codes
        at = self.codes.long()
        return self.codebook[at] if self.tag is None else self.codebook[self.spread(self.tag).long(), at]

    def spread(self, parameter: Tensor) -> Tensor:
        """A parameter of groups [N, G] for each column: [N, K]."""
        return parameter.repeat_interleave(self.group, 1)[:, : self.columns]

    def dequantize(self) -> Tensor:
        """The weight in float32 [N, K], columns in the order of what they multiply."""
        value = self.values().float()
        if self.zero is not None:
            value = value - self.spread(self.zero)
        value = value * self.spread(self.scale)
        if self.permutation is None:
            return value
        found = torch.empty_like(value)
        found[:, self.permutation] = value
        return found


def _check(name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if value.dtype != dtype or tuple(value.shape) != tuple(shape):
        wanted = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
        raise UsageError(f"{name} of a low-bit weight is {wanted}, not {_spelled(value)}")


def _spelled(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
