"""What gates leave to be computed: multiply-accumulates by site, by product and in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.cost import node_costs
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.passes.channel_gating.sites import Site
from graphopt.program import Program

SAMPLES = 256  # at most so many are run

Active = Mapping[str, Tensor]  # bool [samples, blocks] by site


@dataclass(frozen=True)
class Estimate:
    """What gates leave to be computed: means over samples.

    `kept` is the share of blocks at each site, `products` that of the multiply-accumulates of each product that
    computes less, `total` of all of the program's.
    """

    kept: Mapping[str, float]
    products: Mapping[str, float]
    total: float


def count_kept(site: Site, keep: float) -> int:
    """Blocks that a share of them is, at least one."""
    return max(1, round(keep * site.blocks))


def shares(program: Program, sites: Sequence[Site], active: Active) -> Estimate:
    """Means over samples of what `active` leaves; a product between two sites has the product of their shares."""
    by_sample: dict[str, Tensor] = {}
    for site in sites:
        share = active[site.name].double().mean(1)
        for product in site.products:
            before = by_sample.get(product.node.name)
            by_sample[product.node.name] = share if before is None else before * share
    macs = {node.name: cost.macs for node, cost in node_costs(program).items()}
    products = {name: float(share.mean()) for name, share in by_sample.items()}
    whole = sum(macs.values())
    left = whole - sum(macs[name] * (1 - share) for name, share in products.items())
    kept = {name: float(mask.double().mean()) for name, mask in active.items()}
    return Estimate(kept, products, left / whole if whole else 1.0)


def active_on(program: Program, deciders: Mapping[str, str], samples: Iterable[Sample]) -> Active:
    """What the nodes `deciders`, by site, decide for these samples."""
    rows = {name: _Masks() for name in deciders}
    observe(program, {node: [rows[name]] for name, node in deciders.items()}, samples)
    return {name: torch.cat(item.rows) for name, item in rows.items()}


class _Masks:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def update(self, value: Tensor) -> None:
        self.rows.append(value.clone())

    def result(self) -> Tensor:
        return torch.cat(self.rows)


def describe(sites: Sequence[Site], found: Estimate, what: str) -> list[str]:
    """Sentences on an estimate or on what was measured."""
    each = ", ".join(f"{site.name} {found.kept[site.name]:.0%} of {site.blocks}" for site in sites)
    return [f"{what}: {found.total:.1%} of the multiply-accumulates; blocks of channels kept: {each}"]
