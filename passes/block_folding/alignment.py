"""Bring the hidden units of one block into the order in which its weights come nearest to another's.

Blocks that were trained apart do the same with other units. Weight matching (Ainsworth et al. 2023, "Git Re-Basin",
arXiv 2209.04836): the order of each kind of unit in turn is the best assignment between both blocks' units by the inner
products of all that they own, until no order changes. The function of the block stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.passes.block_folding.assignment import best_assignment
from graphopt.passes.block_folding.hidden_units import HiddenUnits, Weights

_ROUNDING = 1e-9  # of what is gained: less is no gain, so that matching ends


def align(reference: Weights, weights: Weights, kinds: Sequence[HiddenUnits]) -> Weights:
    """`weights` with their hidden units in the order nearest to `reference`; tensors that stay are the same objects."""
    changed = True
    while changed:
        changed = False
        for units in kinds:
            profit = units.similarity(reference, weights)
            order = torch.from_numpy(best_assignment(profit.numpy()))
            gained = profit[torch.arange(units.count), order].sum() - profit.trace()
            if gained > _ROUNDING * profit.abs().amax(dim=1).sum():
                weights = units.moved(weights, order)
                changed = True
    return weights


def squared_distance(left: Weights, right: Weights, positions: Sequence[int]) -> float:
    """The sum of squared differences of the weights at `positions`, in float64."""
    pairs = [(left[number].detach().double(), right[number].detach().double()) for number in positions]
    return float(sum((ours - theirs).square().sum() for ours, theirs in pairs))
