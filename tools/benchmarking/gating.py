"""`--suite gating`: how long networks take that leave out channels, beside themselves without gates, and how right."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.gating_cases import GatingCase
from graphopt.tools.benchmarking.networks import (
    TURN,
    Network,
    Publish,
    Report,
    format_suite,
    format_tables,
    run_networks,
)
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

if TYPE_CHECKING:
    from torch import Tensor

    from graphopt.program import Program


def run_gating(cases: Mapping[str, GatingCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each case."""
    networks: list[Network] = [
        (
            {"name": name, "title": case.title, "about": case.about, "wanted": case.wanted},
            partial(measure_case, case, settings),
        )
        for name, case in cases.items()
    ]
    run_networks("gating", networks, settings, publish)


def measure_case(case: GatingCase, settings: Settings) -> dict[str, Any]:
    rows = [measure_sides(case, number, settings) for number in range(len(case.sides))]
    return {"rows": rows, "ratio": statistics.mean(row["ratio"] for row in rows)}


def measure_sides(case: GatingCase, number: int, settings: Settings) -> dict[str, Any]:
    from graphopt.race import take_turns

    with progress(f"{case.title}: building {number + 1} of {len(case.sides)}"):
        sides = case.sides[number]()
    with progress(f"{case.title}, {sides.label}: compiling and timing"):
        runs = [prepared(program, sides.inputs, len(settings.cores)) for program in (sides.ungated, sides.gated)]
        times = take_turns(runs, settings.rounds, TURN)
    ungated, gated = (1e3 * statistics.median(side) for side in times)
    ratio = statistics.median(after / before for before, after in zip(*times, strict=True))
    return {"label": sides.label, "figures": dict(sides.figures), "ungated": ungated, "gated": gated, "ratio": ratio}


def prepared(program: Program, inputs: Sequence[tuple[Tensor, ...]], threads: int) -> Callable[[], object]:
    """One run, compiled at O2, of each of the inputs after the other."""
    from graphopt.backends.tuner.store import Store
    from graphopt.compile import compile
    from graphopt.optimize import optimize

    cleaned = optimize(program, "O2", verify="structure").program
    session = compile(cleaned, database=Store.empty(), threads=threads).session(threads)
    names = [spec.name for spec in program.inputs]
    feeds = [{name: value.numpy() for name, value in zip(names, given, strict=True)} for given in inputs]

    def run() -> None:
        for feed in feeds:
            session.run(None, feed)

    return run


def is_right(model: Report) -> bool:
    """Whether it was measured, and is as fast as is wanted: on the mean, or kernel by kernel."""
    if "failed" in model:
        return False
    ratios = [row["ratio"] for row in model["rows"]] if model["name"] == "kernels" else [model["ratio"]]
    return all(ratio <= model["wanted"] for ratio in ratios)


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    wanted = f"mean ratio {model['ratio']:.3f}, wanted: at most {model['wanted']:g}"
    return "\n".join((f"{model['title']}: {model['about']}", format_table(rows(model)), wanted))


def rows(model: Report) -> list[dict[str, Any]]:
    """One row for each pair; times are of all inputs together."""
    return [
        {
            "": row["label"],
            **{name: f"{value:.4g}" for name, value in row["figures"].items()},
            "ms": f"{row['ungated']:.3f}",
            "ms gated": f"{row['gated']:.3f}",
            "ratio": f"{row['ratio']:.3f}",
        }
        for row in model["rows"]
    ]


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
