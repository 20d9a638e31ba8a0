"""Weights as codes, and the calls that make numbers of them again.

- int8: symmetric, -127 to 127, (code * scale);
- int4: symmetric, -8 to 7, one code an int8; each scale is the best of a few below the one that clips nothing;
- nf4: one of 16 quantiles of the normal distribution times the largest weight of the group (Dettmers et al. 2023,
  "QLoRA", arXiv 2305.14314, appendix E);
- fp8: a float of 4 exponent and 3 mantissa bits, e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433), times a scale.

One scale is for the whole weight, for each output channel, or for each run of `group` inputs of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

import graphopt.operators  # noqa: F401  registers graphopt::
from graphopt.edit import Builder
from graphopt.low_bit.grids import normal_quantiles
from graphopt.passes.quantize.activations import LEAST_SCALE

Kind = Literal["int8", "int4", "nf4", "fp8"]
Granularity = Literal["per-tensor", "per-channel", "per-group"]

_DEQUANTIZE = torch.ops.graphopt.dequantize.default
_LOOKUP = torch.ops.graphopt.dequantize_lookup.default
BOUNDS = {"int8": (-127, 127), "int4": (-8, 7)}
BITS = {"int8": 8, "int4": 4, "nf4": 4, "fp8": 8}
_SHRINKS = tuple(1 - 0.025 * step for step in range(17))  # of the scale that clips nothing, for int4
_LARGEST_FP8 = 448.0


@dataclass(frozen=True)
class Encoded:
    """Codes of a weight and what they stand for; `axis` and `block` are those of graphopt::dequantize."""

    kind: Kind
    codes: Tensor
    scale: Tensor
    axis: int | None
    block: int

    @property
    def bytes(self) -> int:
        """What the codes, packed, and their float32 scales take."""
        return math.ceil(self.codes.numel() * BITS[self.kind] / 8) + 4 * self.scale.numel()

    def numbers(self) -> Tensor:
        """The weight in float32, exactly as the graph computes it."""
        if self.kind in BOUNDS:
            low, high = BOUNDS[self.kind]
            where = {"axis": self.axis, "block": self.block}
            result: Tensor = _DEQUANTIZE(
                self.codes, self.scale, None, **where, qmin=low, qmax=high, dtype=torch.float32
            )
            return result
        found: Tensor = _LOOKUP(self.codes, table(self.kind), self.scale, axis=self.axis, block=self.block)
        return found

    def build(self, builder: Builder) -> Node:
        """The node that gives `numbers()`."""
        codes, scale = builder.constant(self.codes), builder.constant(self.scale)
        where = {"axis": self.axis, "block": self.block}
        if self.kind in BOUNDS:
            low, high = BOUNDS[self.kind]
            return builder.call(_DEQUANTIZE, codes, scale, None, **where, qmin=low, qmax=high, dtype=torch.float32)
        return builder.call(_LOOKUP, codes, builder.constant(table(self.kind)), scale, **where)


@dataclass(frozen=True)
class WeightForm:
    """How weights are encoded; `group` counts inputs that share a scale where that is per group."""

    kind: Kind
    granularity: Granularity
    group: int = 128

    def refusal(self, weight: Tensor) -> str | None:
        """Why there are no codes for this weight, or None."""
        if not bool(weight.isfinite().all()):
            return "its weight has infinities or NaN"
        if self.granularity == "per-group" and weight.dim() != 2:
            return f"groups run along the inputs of a linear, and its weight has {weight.dim()} axes"
        return None

    def encode(self, weight: Tensor, outputs: int, inputs: int) -> Encoded:
        """Codes of a finite weight; `outputs` and `inputs` are its axes of channels made and read."""
        value = weight.detach().float()
        if self.granularity == "per-group":
            return self._in_groups(value, inputs)
        if self.granularity == "per-tensor":
            rows = value.reshape(1, -1)
        else:
            rows = value.movedim(outputs, 0).reshape(value.shape[outputs], -1)
        scale, codes = self._rows(rows)
        if self.granularity == "per-tensor":
            return Encoded(self.kind, codes.reshape(value.shape), scale.reshape(()), None, 0)
        moved = value.movedim(outputs, 0).shape
        return Encoded(self.kind, codes.reshape(moved).movedim(0, outputs).contiguous(), scale, outputs, 0)

    def _in_groups(self, value: Tensor, inputs: int) -> Encoded:
        moved = value.movedim(inputs, 1)
        count, size = moved.shape
        group = min(self.group, size)
        padded = torch.nn.functional.pad(moved, (0, -size % group))  # zeros change no scale
        scale, codes = self._rows(padded.reshape(-1, group))
        codes = codes.reshape(count, -1)[:, :size].movedim(1, inputs).contiguous()
        return Encoded(self.kind, codes, scale.reshape(count, -1).movedim(1, inputs).contiguous(), inputs, group)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] scales and [rows, size] codes."""
        largest = rows.abs().amax(1).double()
        if self.kind == "int4":
            return _least_error(rows, largest / 7)
        scale = _usable(largest / {"int8": 127.0, "nf4": 1.0, "fp8": _LARGEST_FP8}[self.kind])
        if self.kind == "int8":
            return scale, _whole(rows, scale, "int8")
        if self.kind == "fp8":
            return scale, (rows / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        numbers = table("nf4")
        between = (numbers[1:] + numbers[:-1]) / 2
        return scale, torch.bucketize(rows / scale[:, None], between).to(torch.uint8)


def _usable(scale: Tensor) -> Tensor:
    """Scales in float32: 1 where all weights are zero, never denormal."""
    return torch.where(scale > 0, scale.clamp(min=LEAST_SCALE), 1.0).float()


def _whole(rows: Tensor, scale: Tensor, kind: str) -> Tensor:
    return (rows / scale[:, None]).round().clamp(*BOUNDS[kind]).to(torch.int8)


def _least_error(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The shrunken scale of each row with the least sum of squared differences, and its codes."""
    best_scale = _usable(scale)
    best = _whole(rows, best_scale, "int4")
    least = _squares(rows, best, best_scale)
    for shrink in _SHRINKS[1:]:
        tried = _usable(scale * shrink)
        codes = _whole(rows, tried, "int4")
        error = _squares(rows, codes, tried)
        better = error < least
        best_scale, least = torch.where(better, tried, best_scale), torch.where(better, error, least)
        best = torch.where(better[:, None], codes, best)
    return best_scale, best


def _squares(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale[:, None] - rows).square().sum(1)


@cache
def table(kind: Kind) -> Tensor:
    """The float32 numbers that the codes of nf4 [16] and fp8 [256] stand for; the NaN of fp8 are 0, and unused."""
    if kind == "fp8":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    return normal_quantiles()
