"""Early exits: `places` where, `heads` what answers there, `learning` how well, `forms` how the rest is skipped."""

from graphopt.passes.early_exit.insertion import EarlyExit

__all__ = ["EarlyExit"]
