"""What a comparison found, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from graphopt.runtime.features import cpu_name
from graphopt.tools.benchmarking.turns import DRIFT, TURN, Failure, Measurement
from graphopt.tools.benchmarking.usage import Interference
from graphopt.tools.table import format_bytes, format_shape, format_table

Array = np.ndarray[Any, Any]
BUSY = 0.1  # share of the CPUs that others may take before no row is valid
AGREE = 1e-3  # largest error of an output, relative to its largest value, that still counts as the same result
AGREE_IN = {"f32": AGREE, "bf16": 5e-2, "int8": 0.5}  # the same where products are of narrow numbers
NAMES = {"f32": "float32", "bf16": "products in bfloat16", "int8": "products of 8-bit codes"}


def build_report(
    measurements: Sequence[Measurement],
    failures: Sequence[Failure],
    others: Interference,
    feed: Mapping[str, Array],
    expected: Sequence[Array] | None,
    cores: Sequence[int],
    rounds: int,
    dtype: str = "f32",
) -> dict[str, Any]:
    """In seconds; `ratio` is a median over that of the first side, whose outputs also stand in for `expected`."""
    first = measurements[0]
    quiet = others.elsewhere + others.stolen <= BUSY
    reference = first.outputs if expected is None else expected
    rows: list[dict[str, Any]] = [
        {
            "side": item.side,
            "median": item.median,
            "alone": item.median_alone,
            "fastest": min(item.turns),
            "calls": len(item.turns),
            "ratio": item.median / first.median,
            "valid": item.valid and quiet,
            "error": largest_error(reference, item.outputs),
            "load_seconds": item.load_seconds,
            "peak_bytes": item.peak_bytes,
            "about": item.about,
        }
        for item in measurements
    ]
    return {
        "cpu": cpu_name(),
        "cores": list(cores),
        "dtype": dtype,
        "inputs": {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in feed.items()},
        "rounds": rounds,
        "turn_seconds": TURN,
        "interference": asdict(others),
        "reference": "PyTorch" if expected is not None else first.side,
        "rows": rows,
        "failures": [asdict(failure) for failure in failures],
        "agree": all(row["error"] <= AGREE_IN[dtype] for row in rows),
    }


def tolerance(report: Mapping[str, Any]) -> float:
    """The largest error of a row that is right."""
    return AGREE_IN[report.get("dtype", "f32")]


def largest_error(expected: Sequence[Array], outputs: Sequence[Array]) -> float:
    """Over all outputs: max |a - b| / max |a|; infinite where shapes differ or a value is not a number."""
    if len(expected) != len(outputs):
        return float("inf")
    return max((output_error(a, b) for a, b in zip(expected, outputs, strict=True)), default=0.0)


def output_error(expected: Array, output: Array) -> float:
    if expected.shape != output.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    gap = float(np.abs(output.astype(np.float64) - wide).max())
    error = gap / (float(np.abs(wide).max()) or 1.0)
    return error if np.isfinite(error) else float("inf")


def format_rows(report: Mapping[str, Any]) -> str:
    rows = [
        {
            "runtime": row["side"],
            "median ms": f"{row['median'] * 1e3:.3f}",
            "alone ms": f"{row['alone'] * 1e3:.3f}",
            "fastest ms": f"{row['fastest'] * 1e3:.3f}",
            "ratio": f"{row['ratio']:.3f}x",
            "calls": row["calls"],
            "error": f"{row['error']:.1e}",
            "load s": f"{row['load_seconds']:.2f}",
            "memory": format_bytes(row["peak_bytes"]),
            "valid": row["valid"],
        }
        for row in report["rows"]
    ]
    rows += [{"runtime": failure["side"], "median ms": "none"} for failure in report["failures"]]
    text = format_table(rows)
    text += "".join(f"\n{failure['side']} has no figures: {failure['reason']}" for failure in report["failures"])
    if not all(row["valid"] for row in report["rows"]):
        text += (
            f"\nnot valid: in turns and alone differ by over {DRIFT:.0%}, or others took over {BUSY:.0%} of the CPUs"
        )
    if not report["agree"]:
        text += f"\nthe outputs differ by more than {tolerance(report):g} of the largest value"
    return text


def format_notes(report: Mapping[str, Any]) -> str:
    """Everything a reader needs to repeat the figures."""
    inputs = ", ".join(
        f"{name} {item['dtype']} {format_shape(item['shape'])}" for name, item in report["inputs"].items()
    )
    others = report["interference"]
    lines = [
        format_machine(report),
        f"inputs: {inputs}; errors against {report['reference']}",
        f"{report['rounds']} turns of {report['turn_seconds']:g} s each, the others stopped; meanwhile other processes "
        f"took {others['elsewhere']:.0%} of these CPUs and other machines on the host {others['stolen']:.0%}",
    ]
    return "\n".join(lines + [f"{row['side']}: {format_about(row['about'])}" for row in report["rows"]])


def format_machine(report: Mapping[str, Any]) -> str:
    cores = report["cores"]
    plural = "s" * (len(cores) > 1)
    cpus = ",".join(map(str, cores))
    dtype = NAMES[report.get("dtype", "f32")]
    return f"{report['cpu']}, {len(cores)} thread{plural} on CPU{plural} {cpus}, {dtype}"


def format_about(about: Mapping[str, Any]) -> str:
    items = []
    for name, value in about.items():
        if isinstance(value, Mapping):
            items += [f"{key} {item}" for key, item in value.items()]
        else:
            items.append(f"{name} {','.join(value) if isinstance(value, list) else value}")
    return ", ".join(items)
