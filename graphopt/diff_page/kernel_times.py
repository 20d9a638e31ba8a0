"""Which kernels of a compiled artifact compute a node, and how long they take: from the JSON of a profile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UsageError


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in a run: `seconds` is their sum, `share` its part of the model's time, 0 to 1."""

    name: str
    nodes: tuple[str, ...]
    seconds: float
    share: float


def read_kernels(profile: Mapping[str, Any], names: Collection[str]) -> tuple[Kernel, ...]:
    """The kernels that compute nodes with these names. Raises UsageError where there is none."""
    try:
        kernels = [
            Kernel(str(row["kernel"]), tuple(row["nodes"]), float(row["seconds"]), float(row["share"]))
            for row in profile["kernels"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UsageError(
            f"the profile lists no kernels ({type(e).__name__}: {e}); give what `graphopt profile --json FILE` wrote"
        ) from e
    known = frozenset(names)
    found = tuple(kernel for kernel in kernels if not known.isdisjoint(kernel.nodes))
    if not found:
        raise UsageError("the profile names no node of B; profile the artifact that was compiled from B")
    return found
