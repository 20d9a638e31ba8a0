"""`--suite quantization` as a picture: for each network the time of its quantized form over that of float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import finish, label, new_figure, write
from graphopt.tools.benchmarking.report import format_machine


def draw_quantization(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a bar a network, with its figures beside it."""
    models = [model for model in report["models"] if "failed" not in model]
    figure, axes = new_figure(len(models) * 2)
    for at, model in enumerate(models):
        floats, quantized = (row["milliseconds"] for row in model["rows"])
        figures = ", ".join(f"{name} {value:.4f}" for name, value in model["rows"][-1]["figures"].items())
        axes.barh(at, quantized / floats, height=0.6, color="#0b57d0")
        label(axes, quantized / floats + 0.01, at, f"{quantized:.3f} ms of {floats:.3f}; {figures}")
    finish(axes, [model["title"] for model in models], 1.8, "time, float32 = 1")
    axes.axvline(1.0, color="#202124", linewidth=0.8)
    axes.set_title(format_machine(report), loc="left", fontsize=9)
    write(path, figure)
