"""Leave out channels that a sample does not need: `gating` the pass, `sites` where, `targets` which, `forms` how."""

from graphopt.passes.channel_gating.account import Estimate
from graphopt.passes.channel_gating.estimate import estimate
from graphopt.passes.channel_gating.gating import ChannelGating

__all__ = ["ChannelGating", "Estimate", "estimate"]
