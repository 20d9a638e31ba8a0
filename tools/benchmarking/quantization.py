"""`--suite quantization`: what 8 bits cost networks in quality and save in time, each beside its float32 form.

Ranges and scales come from the samples for fitting; figures are those of the samples held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.networks import Network, Publish, Report, format_suite, format_tables, run_networks
from graphopt.tools.benchmarking.quantization_cases import FLOAT, QuantizationCase
from graphopt.tools.progress import progress
from graphopt.tools.table import format_bytes, format_table

FORMS = ("float32", "quantized")


def run_quantization(cases: Mapping[str, QuantizationCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each network."""
    networks: list[Network] = [
        ({"name": name, "title": case.title}, partial(measure_case, case, settings)) for name, case in cases.items()
    ]
    run_networks("quantization", networks, settings, publish)


def measure_case(case: QuantizationCase, settings: Settings) -> dict[str, Any]:
    from graphopt.analysis.storage import stored_weights
    from graphopt.data.dataset import open_data
    from graphopt.optimize import optimize
    from graphopt.tools.benchmarking.folding import latencies

    with progress(f"{case.title}: building"):
        subject = case.build()
    held_out = open_data(subject.data, subject.program).held_out
    rows: list[dict[str, Any]] = []
    programs = []
    for form, passes in zip(FORMS, (FLOAT, case.passes), strict=True):
        with progress(f"{case.title}: {passes}"):
            data = subject.data if form == "quantized" else None
            program = optimize(subject.program, passes, data=data, verify="structure").program
        programs.append(program)
        figures = dict(subject.figures(program, held_out))
        size = sum(item.bytes for item in stored_weights(program))
        rows.append({"form": form, "passes": passes, "figures": figures, "bytes": size})
    with progress(f"{case.title}: compiling and timing"):
        times = latencies(programs, subject.timed, settings)
    for row, seconds in zip(rows, times, strict=True):
        row["milliseconds"] = 1e3 * seconds
    return {
        "about": f"{subject.about}; figures on {len(held_out)} feeds held out",
        "rows": rows,
        "least": least(case, rows[0]["figures"]),
    }


def least(case: QuantizationCase, floats: Mapping[str, float]) -> dict[str, float]:
    """What every figure is to reach."""
    return {name: floats[name] - bound if case.falls else bound for name, bound in case.least.items()}


def is_right(model: Report) -> bool:
    """Whether it was measured, and every figure is as good as wanted; times decide nothing."""
    if "failed" in model:
        return False
    figures = model["rows"][-1]["figures"]
    return all(figures[name] >= bound for name, bound in model["least"].items())


def rows(model: Report) -> list[dict[str, Any]]:
    floats = model["rows"][0]
    return [
        {
            "form": row["form"],
            **{name: f"{value:.5f}" for name, value in row["figures"].items()},
            "weights": format_bytes(row["bytes"]),
            "ms": f"{row['milliseconds']:.3f}",
            "faster": f"{floats['milliseconds'] / row['milliseconds']:.2f}x",
        }
        for row in model["rows"]
    ]


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    wanted = ", ".join(f"{name} at least {bound:.4g}" for name, bound in model["least"].items())
    verdict = "reached" if is_right(model) else "NOT REACHED"
    return "\n".join(
        (
            f"{model['title']}: {model['about']}",
            format_table(rows(model)),
            f"by {model['rows'][-1]['passes']}; {wanted}: {verdict}",
        )
    )


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
