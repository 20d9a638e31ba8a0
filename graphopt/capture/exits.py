"""Early exits as JSON, in the files that programs are saved to. Read as untrusted data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar, get_args, get_type_hints

from graphopt.program import Exits

T = TypeVar("T")


def describe_exits(exits: Exits | None) -> dict[str, Any] | None:
    """The JSON value that `read_exits` reads back."""
    return None if exits is None else asdict(exits)


def read_exits(value: Any, outputs: int) -> Exits | None:
    """Raises ValueError, KeyError or TypeError for what does not describe the exits of so many outputs."""
    if value is None:
        return None
    form, policy, answers = value["form"], value["policy"], value["answers"]
    if form not in get_args(get_type_hints(Exits)["form"]):
        raise ValueError("unknown form")
    if not isinstance(policy, str) or not policy.isprintable() or len(policy) > 100:
        raise ValueError("no policy")
    if type(answers) is not int or not 0 < answers < outputs:
        raise ValueError("no such outputs")
    thresholds = _numbers(value["thresholds"], float)
    macs, shares = _numbers(value["macs"], int), _numbers(value["shares"], float)
    if not len(thresholds) + 1 == len(macs) or len(shares) not in (0, len(macs)):
        raise ValueError("another number of exits")
    return Exits(form, policy, thresholds, answers, macs, shares)


def _numbers(values: Any, kind: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(values, list) or not all(type(item) in (int, float) and math.isfinite(item) for item in values):
        raise ValueError("no list of numbers")
    return tuple(map(kind, values))
