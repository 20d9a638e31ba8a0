"""`--suite gemv`: weights of few bits times one row and many, beside ONNX Runtime and the speed of memory.

Every side is called with inputs and results bound before. ONNX Runtime runs MatMulNBits with activations of 8 bits
(accuracy_level 4), of 2 bits with its tables too (`mlas.use_lut_gemm`); the faster one counts. Streaming passes over a
gigabyte of matrices that all differ, and stands beside reading as much memory in the same turns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.tools.benchmarking.comparison import Settings, compare, save_compiled
from graphopt.tools.benchmarking.gemv_cases import STREAMED, GemvCase
from graphopt.tools.benchmarking.memory_reads import READS, write_reads
from graphopt.tools.benchmarking.networks import Network, Publish, Report, format_suite, format_tables, run_networks
from graphopt.tools.benchmarking.turns import TURN, Entrant
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

__all__ = ["format_markdown", "format_model", "format_suite", "is_right", "run_gemv"]

OURS = "graphopt"
LUT = "mlas.use_lut_gemm"
OF_MEMORY = 0.85  # share of the speed of reading that streaming is to reach
AGREE = 0.05  # largest difference of results of the same numbers, whose activations were rounded differently


def run_gemv(cases: Mapping[str, GemvCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each case."""
    networks: list[Network] = [
        ({"name": name, "title": case.title}, partial(measure_case, case, settings)) for name, case in cases.items()
    ]
    run_networks("gemv", networks, settings, publish, TURN)


def measure_case(case: GemvCase, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        with progress(f"{case.title}: compiling"):
            program = case.program()
            artifact = save_compiled(program, str(folder / "gemv.gopt"), settings)
            case.write_onnx(folder / "gemv.onnx")
        entrants = [
            Entrant("bound-graphopt", task(folder, OURS, {"model": artifact}), name=OURS),
            peer(folder, "onnxruntime", {}),
        ]
        if case.grid.peer == 2:
            entrants.append(peer(folder, "onnxruntime-lut", {LUT: "1"}))
        if case.streaming:
            path = write_reads(folder, STREAMED, len(settings.cores))
            entrants.append(Entrant(READS, path, name=READS))
        feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
        expected = [output.numpy() for output in program(*program.examples)]
        with progress(f"{case.title}: measuring"):
            report = compare(entrants, [], feed, expected, settings)
    return {"case": describe(case), **judge(case, report)}


def task(folder: Path, name: str, value: Mapping[str, Any]) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value))
    return str(path)


def peer(folder: Path, name: str, options: Mapping[str, str]) -> Entrant:
    about = {"model": str(folder / "gemv.onnx"), "options": options}
    return Entrant("bound-onnxruntime", task(folder, name, about), name=name)


def describe(case: GemvCase) -> dict[str, Any]:
    return {
        "n": case.n, "k": case.k, "bits": case.grid.bits, "rows": case.rows, "layers": case.layers,
        "layer_bytes": case.layer_bytes, "peer_bits": case.grid.peer, "wanted": case.wanted,
    }  # fmt: skip


def judge(case: GemvCase, report: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds a matrix, bytes a second, times the fastest peer's speed, and the share of reading."""
    rows = {row["side"]: row for row in report["rows"]}
    ours, memory = rows[OURS], rows.get(READS)
    peers = [row["median"] for side, row in rows.items() if side not in (OURS, READS)]
    reached = case.layers * case.layer_bytes / ours["median"]
    read = STREAMED / memory["median"] if memory else None
    same = case.grid.bits == case.grid.peer and not case.streaming
    errors = {side: row["error"] for side, row in rows.items() if side == OURS or (same and side != READS)}
    return {
        "rows": [
            {
                "side": side,
                "milliseconds": 1e3 * row["median"] / (1 if side == READS else case.layers),
                "valid": row["valid"],
                "about": row["about"],
            }
            for side, row in rows.items()
        ],
        "bytes_per_second": reached,
        "read_bytes_per_second": read,
        "share_of_reading": reached / read if read else None,
        "speedup": min(peers) / ours["median"] if peers else None,
        "errors": errors,
        "failures": report["failures"],
        "interference": report["interference"],
    }


def is_right(model: Report) -> bool:
    """Whether it was measured, and all sides that multiply the same numbers agree; times decide nothing."""
    return "failed" not in model and all(error <= AGREE for error in model["errors"].values())


def reaches(model: Report) -> bool:
    """Whether the times are as good as wanted."""
    share = model["share_of_reading"]
    fast = model["speedup"] is not None and model["speedup"] >= model["case"]["wanted"]
    return fast and (share is None or share >= OF_MEMORY)


def rows(model: Report) -> list[dict[str, Any]]:
    ours = next(row for row in model["rows"] if row["side"] == OURS)
    return [
        {
            "side": row["side"],
            "ms": f"{row['milliseconds']:.4f}",
            "ours is": "" if row is ours else f"{row['milliseconds'] / ours['milliseconds']:.2f}x",
            "GB/s": _speed(model, row["side"]),
            "valid": row["valid"],
        }
        for row in model["rows"]
        if row["side"] != READS
    ] + [
        {
            "side": READS,
            "ms": "",
            "ours is": f"{model['share_of_reading']:.0%}",
            "GB/s": _speed(model, READS),
            "valid": row["valid"],
        }
        for row in model["rows"]
        if row["side"] == READS
    ]


def _speed(model: Report, side: str) -> str:
    speed = {OURS: model["bytes_per_second"], READS: model["read_bytes_per_second"]}.get(side)
    return f"{speed / 1e9:.1f}" if speed else ""


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    case = model["case"]
    wanted = f"wanted {case['wanted']:g}x of ONNX Runtime with {case['peer_bits']} bits"
    wanted += f" and {OF_MEMORY:.0%} of reading" if model["share_of_reading"] is not None else ""
    verdict = "reached" if reaches(model) else "NOT REACHED"
    errors = ", ".join(f"{side} {error:.1e}" for side, error in model["errors"].items())
    about = f"{case['layers']} matrices of {case['layer_bytes'] / 1e6:.2f} MB, {case['rows']} rows"
    return "\n".join((f"{model['title']}: {about}", format_table(rows(model)), f"{wanted}: {verdict}; errors {errors}"))


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
