"""What `exact` means, in numbers: how far a new result may be from float64, given how far the old one is.

A new result passes when its error is at most FACTOR times the old one's, plus RELATIVE times the largest value; a
result that equals the old one bit for bit always does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphopt.checking.reference import largest_error, magnitude

FACTOR, RELATIVE = 4.0, 1e-6


@dataclass(frozen=True)
class Verdict:
    """The error relative to the largest value (infinite where it has no size), and what is wrong, if anything is."""

    error: float
    reason: str | None = None


def judge(old: torch.Tensor, new: torch.Tensor, reference: torch.Tensor) -> Verdict:
    """Hold `new` against `old`; `reference` is what a float64 run gives for both."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return Verdict(math.inf, f"is {describe(new)} instead of {describe(old)}")
    scale = magnitude(reference) or 1.0
    before, after = largest_error(old, reference), largest_error(new, reference)
    allowed = FACTOR * before + RELATIVE * scale
    if after <= allowed or same(old, new):
        return Verdict(after / scale)
    return Verdict(after / scale, f"is off by {after:.3g}, where at most {allowed:.3g} is exact ({before:.3g} before)")


def describe(tensor: torch.Tensor) -> str:
    """ "torch.float32[2, 3]"."""
    return f"{tensor.dtype}{list(tensor.shape)}"


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of all elements, NaN being equal to NaN."""
    return torch.equal(left, right) or bool(((left == right) | (left.isnan() & right.isnan())).all())
