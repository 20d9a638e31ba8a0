"""Optimization levels. Every one is exact: none changes a result by more than rounding."""

from __future__ import annotations

import re

from graphopt.contract import Pass
from graphopt.errors import UsageError
from graphopt.spec_string import make_pass, parse_spec, read_spec

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


def spelled_passes(text: str) -> tuple[Pass, ...]:
    """The passes of a level, or of a spec string with levels among its passes: "O2,mixed-precision{dtype=bf16}".

    Raises UsageError for bad spelling and unknown levels, UnknownNameError for other unknown names.
    """
    if is_level(text):
        return level_passes(text)
    found: list[Pass] = []
    for name, options in read_spec(text):
        if not is_level(name):
            found.append(make_pass(name, options))
        elif options:
            raise UsageError(f"{name} is a level and takes no options; write {name} alone")
        else:
            found.extend(level_passes(name))
    return tuple(found)
