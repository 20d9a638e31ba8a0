"""The account of an `optimize` run: per pass what was rewritten, what was declined and why. All of it is JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graphopt.contract import Declined, Rewrite


@dataclass(frozen=True)
class PassReport:
    """One pass. `error` is the largest relative error against float64 after it; None where it was not measured."""

    name: str
    options: dict[str, Any]
    rewrites: tuple[Rewrite, ...]
    declined: tuple[Declined, ...]
    notes: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    error: float | None

    def summary(self) -> dict[str, Any]:
        """What stays with the program and its artifact; no clock, so that equal runs say the same."""
        counts = {"rewrites": len(self.rewrites), "nodes_before": self.nodes_before, "nodes_after": self.nodes_after}
        return {"name": self.name, "options": _plain(self.options), **counts, "error": self.error}


@dataclass(frozen=True)
class Report:
    """All passes in order; counts are of nodes that compute something."""

    passes: tuple[PassReport, ...]
    nodes_before: int
    nodes_after: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
