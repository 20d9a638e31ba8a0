"""Which passes run, and how they are checked: options that `optimize`, `run-pass` and `compile` share."""

from __future__ import annotations

import argparse
from typing import Any

LEVELS = ("0", "1", "2", "3")


def add_pass_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--passes", metavar="SPEC", help='passes with options, such as "fold-batch-norm,no-op-removal"')
    group.add_argument(
        "-O", dest="level", choices=LEVELS, help="level, -O0 nothing to -O3 all exact passes (default 2)"
    )


def chosen_passes(arguments: argparse.Namespace) -> str:
    """What `optimize` takes as its passes: a spec string or "O2"."""
    return str(arguments.passes or f"O{arguments.level or 2}")


def add_checking_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", choices=("off", "structure", "numeric"), default="numeric", help="(default numeric)"
    )
    parser.add_argument("--target", default="cpu", help="device the passes aim at (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")


def checking_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `graphopt.optimize`."""
    return {name: getattr(arguments, name) for name in ("verify", "target", "seed")}
