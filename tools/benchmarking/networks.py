"""What suites of networks of ours share: one report that grows by a network, whatever one of them fails with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.runtime.features import cpu_name
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.report import format_machine

TURN = 0.1  # seconds; all sides of a network take turns in one process

Report = Mapping[str, Any]
Publish = Callable[[Report], None]
Network = tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]
"""What is said of a network, and what measures it."""


def run_networks(
    suite: str, networks: Iterable[Network], settings: Settings, publish: Publish, turn: float = TURN
) -> None:
    """`publish` is given the report after each network; `turn` is how many seconds a turn takes, at the least."""
    report: dict[str, Any] = {
        "suite": suite,
        "cpu": cpu_name(),
        "cores": list(settings.cores),
        "rounds": settings.rounds,
        "turn_seconds": turn,
        "models": [],
    }
    for about, measure in networks:
        try:
            measured = measure()
        except GraphoptError as e:
            measured = {"failed": " ".join(str(e).split())}
        report["models"].append({**about, **measured})
        publish(report)


def format_suite(report: Report) -> str:
    return f"{format_machine(report)}; medians of {report['rounds']} turns of {report['turn_seconds']:g} s"


def format_tables(report: Report, rows: Callable[[Report], list[dict[str, Any]]], closing: str) -> str:
    """A table of the rows of each network that was measured, and what is said of all of them."""
    parts = []
    for model in report["models"]:
        if "failed" in model:
            continue
        table = rows(model)
        columns = list(table[0])
        head = [f"| {' | '.join(['model', *(name.strip() for name in columns)])} |", f"|{'---|' * (len(columns) + 1)}"]
        body = [f"| {model['title']} | {' | '.join(str(row[name]) for name in columns)} |" for row in table]
        parts.append("\n".join([*head, *body]))
    return "\n\n".join([*parts, closing]) + "\n"
