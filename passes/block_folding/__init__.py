"""Remove or share repeated blocks: `folding` the pass, `blocks` where, `ranking` which, `healing` the fit after it."""

from graphopt.passes.block_folding.folding import BlockFolding

__all__ = ["BlockFolding"]
