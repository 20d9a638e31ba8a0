"""What `exact` means, in numbers: how far a new result may be from float64, given how far the old one is.

A new result passes when its error is at most FACTOR times the old one's, plus RELATIVE times the largest value; a
result that equals the old one always does. Floating-point errors are the largest of all elements. Integers and truth
values are held to it element by element: where one comes of a rounding that went the other way in float64, its error
says nothing of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphopt.checking.reference import errors, largest_error, magnitude, same_elements

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
    if not (old.is_floating_point() or old.is_complex()):
        return _judge_whole_numbers(old, new, reference)
    old, new, reference = _measurable(old, new, reference)
    scale = magnitude(reference) or 1.0
    before, after = largest_error(old, reference), largest_error(new, reference)
    allowed = FACTOR * before + RELATIVE * scale
    if after <= allowed or same(old, new):
        return Verdict(after / scale)
    return Verdict(after / scale, f"is off by {after:.3g}, where at most {allowed:.3g} is exact ({before:.3g} before)")


def _measurable(old: torch.Tensor, new: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements that have an error and a size, of all three.

    Left out are those that overflowed in the old result but not in float64, whose infinite error would allow anything
    elsewhere, and unchanged ones at the ends of the range, such as the lowest number that masks are filled with, beside
    which all others would count as nothing.
    """
    extreme = ~(old.abs() < torch.finfo(old.dtype).max)
    if not extreme.any():
        return old, new, reference
    lost = ~old.isfinite() & ~same_elements(old, reference)
    kept = ~(extreme & (lost | same_elements(old, new)))
    return old[kept], new[kept], reference[kept]


def _judge_whole_numbers(old: torch.Tensor, new: torch.Tensor, reference: torch.Tensor) -> Verdict:
    before, after = errors(old, reference), errors(new, reference)
    scale = magnitude(reference) or 1.0
    slack = RELATIVE * scale if before.any() else 0.0
    wrong = (after > FACTOR * before + slack) & (new != old)
    error = float(after.max()) / scale if after.numel() else 0.0
    if not wrong.any():
        return Verdict(error)
    first, instead = new[wrong][0].item(), old[wrong][0].item()
    return Verdict(error, f"is {first} instead of {instead}, wrong in {int(wrong.sum())} of {wrong.numel()} elements")


def describe(tensor: torch.Tensor) -> str:
    """ "torch.float32[2, 3]"."""
    return f"{tensor.dtype}{list(tensor.shape)}"


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of all elements, NaN being equal to NaN."""
    return torch.equal(left, right) or bool(same_elements(left, right).all())
