"""`--suite gating` as a picture: for each pair the latency with gates over that without, and what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import write
from graphopt.tools.benchmarking.report import format_machine

_SIZE = (4.2, 2.8)  # inches, of one picture
_DPI = 110


def draw_gating(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a picture for each case, a bar for each of its pairs."""
    from matplotlib.figure import Figure

    models = [model for model in report["models"] if "failed" not in model]
    figure = Figure(figsize=(_SIZE[0] * max(1, len(models)), _SIZE[1]), dpi=_DPI, layout="constrained")
    (grid,) = figure.subplots(1, max(1, len(models)), squeeze=False)
    for axes, model in zip(grid, models, strict=False):
        labels = [row["label"] for row in model["rows"]]
        axes.bar(labels, [row["ratio"] for row in model["rows"]], color="#0b57d0")
        axes.axhline(model["wanted"], color="#c5221f", linewidth=1, label=f"wanted: {model['wanted']:g}")
        axes.axhline(1, color="#9aa0a6", linewidth=1)
        axes.set_title(f"{model['title']}: latency with gates / without", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="x", rotation=90 if len(labels) > 4 else 0)
        axes.legend(fontsize=7, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(format_machine(report), fontsize=8)
    write(path, figure)
