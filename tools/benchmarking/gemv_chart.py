"""`--suite gemv` as a picture: for each case how many times as fast as ONNX Runtime's fastest it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.chart import finish, label, new_figure, write
from graphopt.tools.benchmarking.report import format_machine


def draw_gemv(path: str, report: Mapping[str, Any]) -> None:
    """A PNG, whole or not at all: a bar a case, with its time and its speed beside it."""
    models = [model for model in report["models"] if "failed" not in model and model["speedup"] is not None]
    figure, axes = new_figure(len(models) * 2)
    for at, model in enumerate(models):
        axes.barh(at, model["speedup"], height=0.6, color="#0b57d0")
        share = model["share_of_reading"]
        more = "" if share is None else f", {share:.0%} of reading"
        text = f"{model['rows'][0]['milliseconds']:.3f} ms, {model['bytes_per_second'] / 1e9:.1f} GB/s{more}"
        label(axes, model["speedup"] + 0.01, at, text)
    most = max((model["speedup"] for model in models), default=1.0)
    finish(axes, [model["title"] for model in models], 1.6 * most, "speed, ONNX Runtime = 1")
    axes.axvline(1.0, color="#202124", linewidth=0.8)
    axes.set_title(format_machine(report), loc="left", fontsize=9)
    write(path, figure)
