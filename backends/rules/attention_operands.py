"""What attention reads besides numbers: where a row of q, k or v lies, and what the mask makes of a score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends import approximations
from graphopt.backends.kernel import Kernel
from graphopt.backends.values import View

MASKED = -math.inf
f32 = approximations.f32


@dataclass(frozen=True)
class Strides:
    """Where (batch, head, row, 0) lies in a view [B, H, S, D] whose last axis is contiguous."""

    flat: Any
    offset: Any
    batch: Any
    head: Any
    row: Any

    def at(self, batch: Any, head: Any, row: Any) -> Any:
        return self.offset + batch * self.batch + head * self.head + row * self.row


def strides_of(kernel: Kernel, view: View) -> Strides:
    batch, head, row = (kernel.size(stride) for stride in view.strides[:3])
    return Strides(kernel.flat(view.storage), kernel.size(view.offset), batch, head, row)


@dataclass(frozen=True)
class Masks:
    """The mask that was given, if any, and whether row r attends to columns up to r only."""

    given: View | None
    causal: bool

    @property
    def same_for_rows(self) -> bool:
        """The mask that was given is one for all rows."""
        return self.given is not None and (self.given.shape[-2] == 1 or self.given.strides[-2] == 0)

    def term(self, kernel: Kernel, axes: tuple[Any, ...]) -> Any:
        """What the given mask adds to the score at these axes of [B, H, S, T]: its number, or 0 or -inf."""
        mask = self.given
        if mask is None:
            return f32(0)
        skip = len(axes) - len(mask.shape)
        position = kernel.size(mask.offset)
        for number, (size, stride) in enumerate(zip(mask.shape, mask.strides, strict=True)):
            if size != 1 and stride != 0:
                position = position + axes[skip + number] * kernel.size(stride)
        value = kernel.flat(mask.storage)[position]
        return tirx.Select(value, f32(0), f32(MASKED)) if mask.dtype == "bool" else value.astype("float32")
