"""What suites of networks of ours share: one report that grows by a network, whatever one of them fails with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.runtime.features import cpu_name
from graphopt.tools.benchmarking.comparison import Settings

TURN = 0.1  # seconds; all sides of a network take turns in one process

Report = Mapping[str, Any]
Publish = Callable[[Report], None]
Network = tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]
"""What is said of a network, and what measures it."""


def run_networks(suite: str, networks: Iterable[Network], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each network."""
    report: dict[str, Any] = {
        "suite": suite,
        "cpu": cpu_name(),
        "cores": list(settings.cores),
        "rounds": settings.rounds,
        "turn_seconds": TURN,
        "models": [],
    }
    for about, measure in networks:
        try:
            measured = measure()
        except GraphoptError as e:
            measured = {"failed": " ".join(str(e).split())}
        report["models"].append({**about, **measured})
        publish(report)
