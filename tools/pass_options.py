"""Which passes run, and how they are checked: options that `optimize`, `run-pass` and `compile` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from graphopt.errors import UsageError

LEVELS = ("0", "1", "2", "3")
EXAMPLE = "batch-norm-folding,constant-folding{max-bytes=1024}"
LATER = ("--recipe", "--data", "--metric", "--tune")


class Later(argparse.Action):
    """An option that is part of the command line and whose work this version cannot do."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        raise UsageError(f"{option} comes with a later version; leave it out")


def add_pass_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--passes", metavar="SPEC", help=f'passes with options, such as "{EXAMPLE}"')
    group.add_argument(
        "-O", dest="level", choices=LEVELS, help="level, -O0 nothing to -O3 all exact passes (default 2)"
    )
    add_later_options(parser, LATER)


def add_later_options(parser: argparse.ArgumentParser, options: Sequence[str]) -> None:
    for option in options:
        parser.add_argument(option, nargs="?", action=Later, help=argparse.SUPPRESS)


def chosen_passes(arguments: argparse.Namespace) -> str:
    """What `optimize` takes as its passes: a spec string or "O2"."""
    if arguments.passes is None:
        return f"O{arguments.level or 2}"
    if not arguments.passes.strip():
        raise UsageError(f"--passes is empty; write -O0 for no passes, or passes such as {EXAMPLE}")
    return str(arguments.passes)


def add_checking_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", choices=("off", "structure", "numeric"), default="numeric", help="(default numeric)"
    )
    parser.add_argument("--target", default="cpu", help="device the passes aim at (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")


def checking_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `graphopt.optimize`."""
    return {name: getattr(arguments, name) for name in ("verify", "target", "seed")}
