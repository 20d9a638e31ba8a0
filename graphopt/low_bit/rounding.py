"""Weights rounded to a grid, group by group: to the nearest number, by the grid's own steps or by the best of some."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.low_bit.grids import Grid, Kind, Steps
from graphopt.low_bit.weight import LEAST_GROUP, LowBitWeight

FitSteps = Callable[[Grid, Tensor], Steps]
"""Steps for rows of float32 [R, S]."""

_SHRINKS = tuple(1 - 0.05 * step for step in range(15))  # of a range: 1 to 0.3
_SIZES = tuple(1 + 0.1 * step for step in (*range(11), *range(-1, -5, -1)))  # of a mean magnitude: 0.6 to 2
_CANDIDATES: dict[Kind, Sequence[float]] = {"ternary": _SIZES, "sign": (1.0,), "mxfp4": (1.0, 2.0, 0.5)}


def own_steps(grid: Grid, rows: Tensor) -> Steps:
    """By the rule of the grid: its ends on the ends of the numbers, or their mean magnitude."""
    return grid.steps(rows)


def least_error_steps(grid: Grid, rows: Tensor) -> Steps:
    """The steps with the least squared error among the rule's own and those of shrunken ranges."""
    best: Steps | None = None
    least = torch.full((len(rows),), float("inf"))
    for shrink in _CANDIDATES.get(grid.kind, _SHRINKS):
        tried = grid.steps(rows, shrink)
        error = (grid.numbers(grid.codes(rows, tried), tried) - rows).square().sum(1)
        best = tried if best is None else best.where(error < least, tried)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def rounded(weight: Tensor, grid: Grid, group: int, fit: FitSteps = own_steps) -> LowBitWeight:
    """The weight [N, K] with every number rounded to the nearest of its group; `group` may exceed K.

    Raises UsageError for a weight that is not finite or has not two axes, and for a group under 16.
    """
    value, group = checked(weight, group)
    whole = value.shape[1] // group * group
    parts = [value[:, :whole].reshape(-1, group)]
    if whole < value.shape[1]:
        parts.append(value[:, whole:])
    steps = [fit(grid, rows) for rows in parts]
    codes = [grid.codes(rows, own).reshape(len(value), -1) for rows, own in zip(parts, steps, strict=True)]
    return assembled(grid, torch.cat(codes, 1), steps, group)


def checked(weight: Tensor, group: int) -> tuple[Tensor, int]:
    """The weight in float32 and the group within it."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(f"a weight to be put in few bits is floating [N, K], not {weight.dtype}{list(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise UsageError("a weight with infinities or NaN has no codes")
    if group < LEAST_GROUP:
        raise UsageError(f"group={group} of a low-bit weight must be {LEAST_GROUP} or more")
    return weight.detach().float(), min(group, weight.shape[1])


def assembled(
    grid: Grid, codes: Tensor, steps: Sequence[Steps], group: int, permutation: Tensor | None = None
) -> LowBitWeight:
    """A weight of `codes` [N, K]; `steps` are of runs of groups, row by row, in order."""

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part.reshape(len(codes), -1) for part in parts if part is not None]
        return torch.cat(known, 1).contiguous() if known else None

    scale = joined([item.scale for item in steps])
    assert scale is not None
    zero, tag = joined([item.zero for item in steps]), joined([item.tag for item in steps])
    return LowBitWeight(codes.contiguous(), scale, grid.bits, group, zero, grid.codebook, tag, permutation)
