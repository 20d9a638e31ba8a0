"""`--suite opening` as a picture: milliseconds from the start of a process to a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import finish, label, new_figure, write
from graphopt.tools.benchmarking.report import format_machine


def draw_opening(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a bar for each side of each case."""
    rows = [(model["title"], row) for model in report["models"] if "failed" not in model for row in model["rows"]]
    figure, axes = new_figure(len(rows) * 2)
    for at, (_, row) in enumerate(rows):
        axes.barh(at, 1e3 * row["seconds"], height=0.6, color="#0b57d0")
        label(axes, 1020 * row["seconds"], at, f"{1e3 * row['seconds']:.0f} ms, {row['bytes'] / 1e6:.0f} MB")
    most = max((1e3 * row["seconds"] for _, row in rows), default=1.0)
    finish(axes, [f"{title}, {row['side']}" for title, row in rows], 1.4 * most, "milliseconds")
    axes.set_title(format_machine(report), loc="left", fontsize=9)
    write(path, figure)
