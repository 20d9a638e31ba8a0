"""`--tune` and `--database`: how kernels get their configurations where a command compiles."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

NONE = "none"  # in place of a folder: the defaults


@dataclass(frozen=True)
class Tuning:
    """Seconds to measure before compiling, and the store: a folder, `NONE` for the defaults, None for the user's."""

    seconds: float | None = None
    database: str | None = NONE

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `graphopt.compile`."""
        from graphopt.backends.tuner.store import Store

        return {"tune": self.seconds, "database": Store.empty() if self.database == NONE else self.database}

    def describe(self) -> dict[str, Any]:
        """For a report."""
        return {"tune_seconds": self.seconds, "database": self.database}


UNTUNED = Tuning()


def add_tuning_options(parser: argparse.ArgumentParser, default: str) -> None:
    """`default` says what is taken without --database."""
    help = "measure configurations of the model's kernels for so long, and keep the best ones"
    parser.add_argument("--tune", metavar="SECONDS", type=float, help=help)
    help = f"folder of the store of tuned configurations, or {NONE}: kernels as they are untuned (default: {default})"
    parser.add_argument("--database", metavar="DIR", help=help)
