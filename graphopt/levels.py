"""Optimization levels. Every one is exact: none changes a result by more than rounding."""

from __future__ import annotations

import re

from graphopt.contract import Pass
from graphopt.errors import UsageError
from graphopt.spec_string import parse_spec

CLEANUP = ("dead-code", "constant-folding", "no-op-removal", "decided-conditions", "common-subexpressions")
FUSIONS = ("batch-norm-folding", "scale-folding", "merge-linears")

LEVELS: dict[str, tuple[str, ...]] = {
    "O0": (),
    "O1": CLEANUP,
    "O2": (*CLEANUP, *FUSIONS),
    "O3": (*CLEANUP, *FUSIONS),  # exact rewrites that must prove faster are added here, behind O2
}
_LEVEL_LIKE = re.compile(r"-?[Oo]?-?\d+|-?[Oo]\w?", re.ASCII)


def is_level(text: str) -> bool:
    """Whether `text` is meant as a level, one that exists or not ("O7", "-O2"): no pass has such a name."""
    return _LEVEL_LIKE.fullmatch(text) is not None


def level_passes(name: str) -> tuple[Pass, ...]:
    """The passes of a level, in order."""
    if name not in LEVELS:
        raise UsageError(f"unknown level {name!r}; the levels are {', '.join(LEVELS)}")
    return parse_spec(",".join(LEVELS[name])) if LEVELS[name] else ()
