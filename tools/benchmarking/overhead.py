"""`--suite overhead`: what a call of `session.run` takes besides its kernel, by models of one kernel that takes none.

The median of whole calls less the median of the kernel, as `profile` times it; ONNX Runtime's call of the same model
stands beside it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.tools.benchmarking.comparison import Settings, compare, save_compiled
from graphopt.tools.benchmarking.networks import Network, Publish, Report, format_suite, format_tables, run_networks
from graphopt.tools.benchmarking.peers import installed, peer_entrants
from graphopt.tools.benchmarking.report import AGREE
from graphopt.tools.benchmarking.turns import TURN, Entrant
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

if TYPE_CHECKING:
    from graphopt.program import Program

__all__ = ["format_markdown", "format_model", "format_suite", "is_right", "run_overhead"]

OURS, KERNEL, PEER = "graphopt", "kernel", "onnxruntime"
WANTED = 30e-6  # seconds besides the kernel
WIDTH = 64


@dataclass(frozen=True)
class OverheadCase:
    """A linear layer on float32 [1, 64]; `dynamic`: compiled for any number of rows, which each call then checks."""

    title: str
    dynamic: bool = False

    def program(self) -> Program:
        import torch

        import graphopt

        torch.manual_seed(0)
        sizes: Any = {"input": {0: "rows"}} if self.dynamic else None
        return graphopt.capture(
            torch.nn.Linear(WIDTH, WIDTH), (torch.randn(1, WIDTH),), dynamic_shapes=sizes, name="overhead"
        )


CASES: Mapping[str, OverheadCase] = {
    "fixed": OverheadCase("linear 1x64"),
    "dynamic": OverheadCase("linear rows x 64, 1 row", dynamic=True),
}


def run_overhead(cases: Mapping[str, OverheadCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each case."""
    networks: list[Network] = [
        ({"name": name, "title": case.title}, partial(measure_case, case, settings)) for name, case in cases.items()
    ]
    run_networks("overhead", networks, settings, publish, TURN)


def measure_case(case: OverheadCase, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        with progress(f"{case.title}: compiling"):
            program = case.program()
            artifact = save_compiled(program, str(folder / "model.gopt"), settings)
        nodes = [node.name for node in program.graph_module.graph.nodes if node.op == "call_function"]
        task = folder / "kernel.json"
        task.write_text(json.dumps({"artifact": artifact, "nodes": nodes}))
        entrants = [Entrant(OURS, artifact), Entrant(KERNEL, str(task))]
        others, failures = peer_entrants(program, [PEER] if installed(PEER) else [], folder)
        feed = {spec.name: value.numpy()[:1] for spec, value in zip(program.inputs, program.examples, strict=True)}
        expected = [output.numpy()[:1] for output in program(*program.examples)]
        with progress(f"{case.title}: measuring"):
            report = compare([*entrants, *others], failures, feed, expected, settings)
    return judge(report)


def judge(report: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the sides, and what ours takes besides the kernel."""
    rows = {row["side"]: row for row in report["rows"]}
    return {
        "rows": [
            {"side": side, "seconds": row["median"], "valid": row["valid"], "about": row["about"]}
            for side, row in rows.items()
        ],
        "overhead": rows[OURS]["median"] - rows[KERNEL]["median"] if KERNEL in rows else None,
        "error": max(row["error"] for row in report["rows"]),
        "failures": report["failures"],
        "interference": report["interference"],
    }


def is_right(model: Report) -> bool:
    """Whether it was measured, and all sides computed the same; times decide nothing."""
    return "failed" not in model and model["overhead"] is not None and bool(model["error"] <= AGREE)


def rows(model: Report) -> list[dict[str, Any]]:
    overhead = model["overhead"]
    return [
        {
            "side": row["side"],
            "us": f"{1e6 * row['seconds']:.2f}",
            "besides the kernel": f"{1e6 * overhead:.2f}" if row["side"] == OURS and overhead is not None else "",
            "valid": row["valid"],
        }
        for row in model["rows"]
    ]


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    if model["overhead"] is None:
        return f"{model['title']}: {model['failures'][0]['reason']}"
    verdict = "reached" if model["overhead"] <= WANTED else "NOT REACHED"
    return "\n".join((model["title"], format_table(rows(model)), f"wanted at most {1e6 * WANTED:g} us: {verdict}"))


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
