"""`--suite decode` as a picture: tokens a second by the form of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import finish, label, new_figure, write
from graphopt.tools.benchmarking.report import format_machine


def draw_decode(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a bar a form, and a line where the roofline of that form is."""
    models = [model for model in report["models"] if "failed" not in model]
    figure, axes = new_figure(len(models) * 2)
    most = max((model["bandwidth"] / model["touched_bytes"] for model in models), default=1.0)
    for at, model in enumerate(models):
        rate, roof = model["tokens_per_second"], model["bandwidth"] / model["touched_bytes"]
        axes.barh(at, rate, height=0.6, color="#0b57d0")
        axes.plot((roof, roof), (at - 0.4, at + 0.4), color="#202124", linewidth=1.2)
        beside = f", ONNX Runtime {model['peer_tokens_per_second']:.1f}" if "over_peer" in model else ""
        label(axes, max(rate, roof) + 0.01 * most, at, f"{rate:.1f}{beside}")
    finish(axes, [model["title"] for model in models], 1.3 * most, "tokens a second; the line is the roofline")
    axes.set_title(format_machine(report), loc="left", fontsize=9)
    write(path, figure)
