"""How numbers of a range become 8-bit codes: the scale and the zero point, which stands for 0 exactly.

A range is widened to hold 0, so that padding and masks of zeros stay exact. Asymmetric codes are uint8 from 0 to 255,
symmetric ones int8 from -128 to 127 with the zero point 0, as TensorRT takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_SCALE = 2.0**-126  # the least normal float32: kernels flush what is below to zero, and divide by it


@dataclass(frozen=True)
class Range:
    """The least and the largest number that get a code of their own; what is beyond is clamped to them."""

    low: float
    high: float

    def widened(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class ActivationForm:
    """uint8 with a zero point, or int8 without where `symmetric`."""

    symmetric: bool = False

    @property
    def codes(self) -> Mapping[str, Any]:
        """The arguments `qmin`, `qmax` and `dtype` of graphopt::quantize."""
        if self.symmetric:
            return {"qmin": -128, "qmax": 127, "dtype": torch.int8}
        return {"qmin": 0, "qmax": 255, "dtype": torch.uint8}

    def parameters(self, found: Range) -> tuple[Tensor, Tensor | None]:
        """Scale (float32) and zero point (uint8; None where symmetric), both without axes."""
        low, high = min(found.low, 0.0), max(found.high, 0.0)
        width = max(-low, high) / 127 if self.symmetric else (high - low) / 255
        scale = torch.tensor(max(width, LEAST_SCALE) if width else 1.0, dtype=torch.float32)
        if self.symmetric:
            return scale, None
        zero = round(min(max(-low / float(scale), 0.0), 255.0))
        return scale, torch.tensor(zero, dtype=torch.uint8)

    def rounded(self, values: Tensor, found: Range) -> Tensor:
        """What codes of this range make of float64 values."""
        scale, zero = self.parameters(found)
        shift = 0 if zero is None else int(zero)
        codes = (values / float(scale)).round() + shift
        return (codes.clamp(self.codes["qmin"], self.codes["qmax"]) - shift) * float(scale)
