"""What gating would save, known before any training: the work that the targets themselves leave."""

from __future__ import annotations

from itertools import islice
from typing import Any

from graphopt.data.dataset import Dataset, open_data
from graphopt.errors import UsageError
from graphopt.passes.channel_gating.account import SAMPLES, Estimate, count_kept, shares
from graphopt.passes.channel_gating.gating import sites_of
from graphopt.passes.channel_gating.targets import block_heat, group_channels, look, share_targets
from graphopt.program import Program


def estimate(program: Program, data: Any, *, mass: float | None = None, keep: float | None = None) -> Estimate:
    """The share of multiply-accumulates that gates which follow their targets leave, on what the data has to fit on.

    `data` is what `graphopt.optimize` takes. Give `mass`, how much of the heat is kept, or `keep`, the share of the
    blocks. Raises UsageError where neither or both are given.
    """
    if (mass is None) == (keep is None):
        raise UsageError(f"mass={mass} and keep={keep}: give one of them")
    dataset = data if isinstance(data, Dataset) else open_data(data, program)
    sites = sites_of(program, through_norms=True)
    seen = look(program, sites, islice(dataset.fit, SAMPLES))
    active = {}
    for site in sites:
        heat = seen[site.name].heat
        blocks = block_heat(heat, group_channels(heat, site.block), site.block)
        active[site.name] = share_targets(blocks, mass, None if keep is None else count_kept(site, keep))
    return shares(program, sites, active)
