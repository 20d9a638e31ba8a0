"""The suites as pictures: each runtime's time beside ours, and each kernel's share of the machine's roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.tools.benchmarking.report import format_machine
from graphopt.tools.benchmarking.summary import format_mean, row_of
from graphopt.tools.output_file import replace_file

Report = Mapping[str, Any]

COLOURS = {
    "graphopt": "#0b57d0",
    "graphopt-f32": "#8ab4f8",
    "onnxruntime": "#e8710a",
    "openvino": "#7b1fa2",
    "inductor": "#c5221f",
    "tvm": "#5f6368",
    "torch": "#c5221f",
}
LONGEST = 3.0  # times our own; a longer bar is cut, its number is not
_WIDTH, _BAR, _AROUND = 10.0, 0.2, 1.6  # inches
_DPI = 120
_DARK, _GRID = "#202124", "#e0e0e0"


def draw_models(path: str, report: Report) -> None:
    """A PNG, whole or not at all: for every model one bar a runtime, as long as its time over ours."""
    models = [model for model in report["models"] if "failed" not in model]
    sides = ["graphopt", *report["peers"]]
    figure, axes = new_figure(len(models) * (len(sides) + 1))
    height = 0.86 / len(sides)
    for at, model in enumerate(models):
        ours = model["rows"][0]["median"]
        for number, side in enumerate(sides):
            row = row_of(model, side)
            if row is None:
                continue
            ratio = row["median"] / ours
            text = f"{row['median'] * 1e3:.2f} ms" + ("" if side == "graphopt" else f", {ratio:.2f}x")
            place = at + (number - (len(sides) - 1) / 2) * height
            axes.barh(place, min(ratio, LONGEST), height=height * 0.9, color=COLOURS[side], label=side)
            label(axes, min(ratio, LONGEST) + 0.02, place, text if row["valid"] else f"{text} (not valid)")
    axes.axvline(1.0, color=_DARK, linewidth=0.8)
    titles = [model["title"] if model["counts"] else f"{model['title']}\nno schedule written" for model in models]
    finish(axes, titles, LONGEST + 0.6, f"time, graphopt = 1 (cut at {LONGEST:g})")
    legend(figure, axes)
    axes.set_title(f"{format_mean(report['summary'])}\n{format_machine(report)}", loc="left", fontsize=9, color=_DARK)
    write(path, figure)


def draw_kernels(path: str, report: Report) -> None:
    """A PNG, whole or not at all: for every kernel one bar of ours and one of torch's, as shares of the same roof."""
    kernels = [kernel for kernel in report["kernels"] if "failed" not in kernel]
    figure, axes = new_figure(len(kernels) * 3)
    for at, kernel in enumerate(kernels):
        share = kernel["share_of_roof"] or 0.0
        shares = {"graphopt": share, "torch": share / kernel["ratio"]}
        for number, (side, value) in enumerate(shares.items()):
            place = at + (number - 0.5) * 0.42
            axes.barh(place, value, height=0.38, color=COLOURS[side], label=side)
            roof = f" of {kernel['roof']}" if side == "graphopt" else ""
            label(axes, value + 0.01, place, f"{value:.0%}{roof}")
    finish(axes, [kernel["name"] for kernel in kernels], 1.25, "share of the machine's roof")
    legend(figure, axes)
    axes.set_title(format_machine(report), loc="left", fontsize=9, color=_DARK)
    write(path, figure)


def new_figure(bars: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _AROUND + _BAR * bars), dpi=_DPI, layout="constrained")
    return figure, figure.add_subplot()


def label(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, va="center", fontsize=7, color=_DARK)


def finish(axes: Any, titles: Sequence[str], right: float, what: str) -> None:
    axes.set_yticks(range(len(titles)), titles, fontsize=8)
    axes.set_ylim(len(titles) - 0.45, -0.55)
    axes.set_xlim(0, right)
    axes.set_xlabel(what, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if once:
        place = {"loc": "outside lower center", "ncols": len(once)}
        figure.legend(once.values(), once.keys(), fontsize=8, frameon=False, **place)


def write(path: str, figure: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # no pyplot: it would look for a display and keep the figure
    with replace_file(path) as stream:
        canvas.print_figure(stream, format="png")
