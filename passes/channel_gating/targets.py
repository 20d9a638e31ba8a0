"""Which channels a network would miss least, sample by sample: targets for predictors, and what they would save.

The heat of channel c is max |y_c| over a sample's pixels or rows. Sorted from the highest down and divided by their
sum, channels are kept while what comes before them is less than a given mass: so at least one is, which dropping the
one that crosses the mass would not give (Elkerdawy et al. 2022, arXiv 2110.08232, with k >= 1). Channels that are left
out together have the sum of their heats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.passes.channel_gating.sites import Site
from graphopt.program import Program

NEARLY = 1e-9  # of the mass: what is below is rounding


@dataclass(frozen=True)
class Seen:
    """What one site's values were: `heat` [samples, channels], `features` and `magnitudes` [samples, inputs]."""

    heat: Tensor
    features: Tensor
    magnitudes: Tensor


def heat_of(channel_axis: int, value: Tensor) -> Tensor:
    """[N, channels]: the largest magnitude of each channel of each sample."""
    size = value.detach().abs()
    return size if size.dim() == 2 else size.movedim(channel_axis, 1).flatten(2).amax(2)


class Rows:
    """Gathers a reduction of every value that it is shown."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.reduce = reduce
        self.rows: list[Tensor] = []

    def update(self, value: Tensor) -> None:
        self.rows.append(self.reduce(value))

    def result(self) -> Tensor:
        return torch.cat(self.rows)


def look(program: Program, sites: Sequence[Site], samples: Iterable[Sample]) -> dict[str, Seen]:
    """Run the samples; what was seen at each site, by its name."""
    shown: dict[str, list[Rows]] = {}
    kept: dict[str, tuple[Rows, Rows, Rows]] = {}
    for site in sites:
        axis = site.producer.channel_axis
        heat, mean, magnitude = (Rows(partial(reduce, axis)) for reduce in (heat_of, pooled_mean, pooled_magnitude))
        shown.setdefault(site.gated.name, []).append(heat)
        shown.setdefault(site.producer.input.name, []).extend((mean, magnitude))
        kept[site.name] = heat, mean, magnitude
    observe(program, shown, samples)
    return {name: Seen(*(item.result() for item in items)) for name, items in kept.items()}


def pooled_mean(channel_axis: int, value: Tensor) -> Tensor:
    """float64 [N, channels]: the mean of each channel of each sample."""
    value = value.double()
    return value if value.dim() == 2 else value.movedim(channel_axis, 1).flatten(2).mean(2)


def pooled_magnitude(channel_axis: int, value: Tensor) -> Tensor:
    """float64 [N, channels]: the mean magnitude of each channel of each sample."""
    return pooled_mean(channel_axis, value.abs())


def share_targets(heat: Tensor, mass: float | None = None, count: int | None = None) -> Tensor:
    """bool, like heat [samples, blocks]: those that hold `mass`, or the `count` hottest; equal ones in their order."""
    ordered, places = heat.double().sort(stable=True, dim=1, descending=True)
    first = torch.arange(heat.shape[1]).expand_as(heat)
    kept = first < count if count is not None else _holding(ordered, mass)
    return torch.zeros_like(kept).scatter(1, places, kept)


def _holding(ordered: Tensor, mass: float | None) -> Tensor:
    """Of heat sorted down, what holds the mass: 1 is all that is not zero, more is all."""
    assert mass is not None
    share = share_of(ordered)
    kept = share.cumsum(1) - share < mass - NEARLY if mass < 1 else (ordered > 0) | (mass > 1)
    kept[:, :1] = True
    return kept


def share_of(heat: Tensor) -> Tensor:
    """Heat [samples, channels] over its sum for each sample, float64; zeros stay zeros."""
    heat = heat.double()
    return heat / heat.sum(1, keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def block_heat(heat: Tensor, order: Tensor, block: int) -> Tensor:
    """[samples, blocks] of heat [samples, channels] whose channels are put in this order."""
    blocks: Tensor = heat.double()[:, order].unflatten(1, (-1, block))
    return blocks.sum(2)


def group_channels(heat: Tensor, block: int) -> Tensor:
    """An order [channels] in which channels that are hot for the same samples are in one block.

    Greedy: a block begins with the channel that has most of the heat left, and takes those most alike to what it has.
    """
    channels = heat.shape[1]
    if block == 1:
        return torch.arange(channels)
    share = share_of(heat)
    profile = torch.nn.functional.normalize(share, dim=0)
    left, order = torch.ones(channels, dtype=torch.bool), []
    for _ in range(channels // block):
        first = int(torch.where(left, share.mean(0), -1.0).argmax())
        alike = torch.where(left, profile.T @ profile[:, first], -1.0)
        alike[first] = torch.inf
        chosen = alike.sort(descending=True, stable=True)[1][:block]
        left[chosen] = False
        order += chosen.sort()[0].tolist()
    return torch.tensor(order)
