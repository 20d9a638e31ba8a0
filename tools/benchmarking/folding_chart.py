"""`--suite folding` as a picture: for each network what is kept and what it costs, by the blocks that are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import write
from graphopt.tools.benchmarking.report import format_machine

COLOURS = {"as folded": "#c5221f", "healed": "#188038"}
_SIZE = (3.6, 2.7)  # inches, of one picture
_DPI = 110


def draw_folding(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a row a network, its figures as folded and healed, then its latency and the line."""
    from matplotlib.figure import Figure

    models = [model for model in report["models"] if "failed" not in model]
    columns = max((len(model["points"][0]["figures"]) for model in models), default=0) + 1
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * len(models) + 0.3), dpi=_DPI, layout="constrained")
    grid = figure.subplots(max(1, len(models)), columns, squeeze=False)
    for line, model in zip(grid, models, strict=False):
        names = list(model["points"][0]["figures"])
        for axes in line[len(names) : -1]:
            axes.set_visible(False)
        for axes, name in zip(line, names, strict=False):
            draw_figure(axes, model, name)
        draw_latency(line[-1], model)
    figure.suptitle(format_machine(report), fontsize=8)
    write(path, figure)


def draw_figure(axes: Any, model: Mapping[str, Any], name: str) -> None:
    for variant, colour in COLOURS.items():
        points = [point for point in model["points"] if point["variant"] in (variant, "whole")]
        kept = [point["kept"] for point in points]
        axes.plot(kept, [point["figures"][name] for point in points], "o-", color=colour, label=variant, markersize=4)
    axes.legend(fontsize=7, frameon=False)
    finish(axes, model, f"{model['title']}: {name}")


def draw_latency(axes: Any, model: Mapping[str, Any]) -> None:
    kept = [item["kept"] for item in model["latency"]]
    line = model["line"]
    ends = [min(kept), max(kept)]
    axes.plot(ends, [line["fixed_ms"] + line["ms_a_block"] * end for end in ends], "-", color="#9aa0a6", linewidth=1)
    axes.plot(kept, [item["milliseconds"] for item in model["latency"]], "o", color="#0b57d0", markersize=4)
    axes.set_ylim(bottom=0)
    finish(axes, model, f"{model['title']}: milliseconds")


def finish(axes: Any, model: Mapping[str, Any], title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("blocks kept", fontsize=8)
    axes.set_xticks([item["kept"] for item in model["latency"]])
    axes.tick_params(labelsize=8)
    axes.grid(color="#e0e0e0", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
