"""`--suite exits` as a picture: what each network keeps by the time that it takes, over the whole network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import write
from graphopt.tools.benchmarking.exits import by_title
from graphopt.tools.benchmarking.report import format_machine

COLOURS = {"one_ratio": "#0b57d0", "many_ratio": "#e8710a"}
LABELS = {"one_ratio": "one by one", "many_ratio": "in batches"}
_SIZE = (4.2, 3.2)  # inches, of one picture
_DPI = 110


def draw_exits(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a picture a network, with a point for every seed and target."""
    from matplotlib.figure import Figure

    networks = {title: points for title, points in by_title(report).items() if points}
    count = max(1, len(networks))
    figure = Figure(figsize=(_SIZE[0] * count, _SIZE[1]), dpi=_DPI, layout="constrained")
    (line,) = figure.subplots(1, count, squeeze=False)
    for axes, (title, points) in zip(line, networks.items(), strict=False):
        for key, colour in COLOURS.items():
            across = [point[key] for point in points]
            axes.plot(across, [point["kept"] for point in points], "o", color=colour, label=LABELS[key], markersize=4)
        axes.plot([1.0] * len(points), [point["whole"] for point in points], "k_", label="whole", markersize=9)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("time, whole network = 1", fontsize=8)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e0e0e0", linewidth=0.6)
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(format_machine(report), fontsize=8)
    write(path, figure)
