"""What the suite of models comes to: the best peer of each, the ratio to it, and the geometric mean of the ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.tools.benchmarking.report import format_about, format_machine, format_rows, tolerance
from graphopt.tools.table import format_bytes, format_table

Report = Mapping[str, Any]
SUMMARY_COLUMNS = (
    "model",
    "graphopt ms",
    "best peer",
    "its ms",
    "ratio",
    "error",
    "load s",
    "memory",
    "slow kernels",
    "valid",
)


def judge(report: Report) -> dict[str, Any]:
    """`best_peer` is the fastest whose outputs are right, `ratio` its median over ours; None without one.

    The ratio is `valid` when our row is, and that of every peer that may be the best: whose fastest call took no
    longer than the best peer's median.
    """
    ours, *others = report["rows"]
    right = [row for row in others if row["error"] <= tolerance(report)]
    if not right:
        return {"best_peer": None, "ratio": None, "valid": False}
    best = min(right, key=lambda row: row["median"])
    close = [row for row in right if row["fastest"] <= best["median"]]
    valid = all(row["valid"] for row in (ours, *close)) and ours["error"] <= tolerance(report)
    return {"best_peer": best["side"], "ratio": best["median"] / ours["median"], "valid": valid}


def summarize(models: Sequence[Report]) -> dict[str, Any]:
    """Over the models that count and have a ratio; `valid` when each of those is."""
    counted = [model for model in models if model["counts"] and model.get("ratio") is not None]
    if not counted:
        return {"geometric_mean": None, "smallest": None, "models": 0, "valid": False}
    mean = math.exp(sum(math.log(model["ratio"]) for model in counted) / len(counted))
    smallest = min(counted, key=lambda model: float(model["ratio"]))
    return {
        "geometric_mean": mean,
        "smallest": {"model": smallest["name"], "ratio": smallest["ratio"]},
        "models": len(counted),
        "valid": all(model["valid"] for model in counted),
    }


def is_right(model: Report) -> bool:
    """It ran, and computes what PyTorch does."""
    return "failed" not in model and bool(model["rows"][0]["error"] <= tolerance(model))


def row_of(model: Report, side: str) -> Report | None:
    return next((row for row in model.get("rows", ()) if row["side"] == side), None)


def format_model(model: Report) -> str:
    """One model's table under its configuration."""
    mark = "" if model["counts"] else " (no schedule was written for it)"
    lines = [f"{model['configuration']}{mark}"]
    if "failed" in model:
        return "\n".join([*lines, f"failed: {model['failed']}"])
    lines.append(format_rows(model))
    slow = model["slow_kernels"]
    lines.append(f"compiled in {model['compile_seconds']:.1f} s, {len(slow)} slow of {model['kernels']} kernels")
    lines += [f"  {item['kernel']} ({item['share']:.1%} of the time): {item['reason']}" for item in slow]
    return "\n".join(lines)


def format_head(report: Report) -> str:
    """What a reader needs to repeat the figures."""
    return (
        f"{format_machine(report)}, batch 1; "
        f"{report['rounds']} turns of {report['turn_seconds']:g} s each, the others stopped; "
        f"models from transformers {report['transformers']}"
    )


def format_sides(report: Report) -> list[str]:
    """Versions and options of each side, as it told them at its first model."""
    found: dict[str, str] = {}
    for model in report["models"]:
        for row in model.get("rows", ()):
            found.setdefault(row["side"], format_about(row["about"]))
    return [f"{side}: {about}" for side, about in found.items()]


def format_suite(report: Report) -> str:
    rows = [summary_cells(model) for model in report["models"]]
    about = [format_head(report), *format_sides(report)]
    return "\n".join([*about, "", format_table(rows, SUMMARY_COLUMNS), format_mean(report["summary"])])


def summary_cells(model: Report) -> dict[str, Any]:
    if "failed" in model:
        return {"model": model["title"], "best peer": "failed"}
    ours = model["rows"][0]
    best = row_of(model, model["best_peer"])
    return {
        "model": model["title"],
        "graphopt ms": f"{ours['median'] * 1e3:.2f}",
        "best peer": model["best_peer"],
        "its ms": f"{best['median'] * 1e3:.2f}" if best else None,
        "ratio": format_ratio(model),
        "error": f"{ours['error']:.1e}",
        "load s": f"{ours['load_seconds']:.2f}",
        "memory": format_bytes(ours["peak_bytes"]),
        "slow kernels": len(model["slow_kernels"]),
        "valid": model["valid"],
    }


def format_ratio(model: Report) -> str:
    return "" if model.get("ratio") is None else f"{model['ratio']:.2f}x"


def format_mean(summary: Report) -> str:
    if summary["geometric_mean"] is None:
        return "no model that counts was measured beside a peer"
    smallest, count = summary["smallest"], summary["models"]
    text = (
        f"best peer / graphopt over {count} model{'s' * (count > 1)}: geometric mean "
        f"{summary['geometric_mean']:.2f}x, smallest {smallest['ratio']:.2f}x ({smallest['model']})"
    )
    return text if summary["valid"] else f"{text}; not valid: a row was disturbed or is wrong"


def format_markdown(report: Report) -> str:
    """A table for a README: medians in ms, then what was measured and how."""
    peers = [peer for peer in report["peers"] if any(row_of(model, peer) for model in report["models"])]
    titles = ["model", "graphopt", *peers, "best peer / graphopt", "load s", "peak memory", "slow kernels"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(markdown_cells(model, peers)) + " |" for model in report["models"]]
    notes = [f"Medians in ms. {format_head(report)}.", f"{format_mean(report['summary'])}."]
    notes += [f"- {line}" for line in (*format_sides(report), *(model["configuration"] for model in report["models"]))]
    return "\n".join([*lines, "", *notes[:2], "", *notes[2:]]) + "\n"


def markdown_cells(model: Report, peers: Sequence[str]) -> list[str]:
    title = model["title"] if model["counts"] else f"{model['title']} (no schedule written for it)"
    if "failed" in model:
        return [title, "failed", *("" for _ in peers), "", "", "", ""]
    ours = model["rows"][0]
    medians = [milliseconds(row_of(model, side), tolerance(model)) for side in (ours["side"], *peers)]
    ratio = format_ratio(model) + ("" if model["valid"] or model["ratio"] is None else " (not valid)")
    load = beside(model, lambda row: f"{row['load_seconds']:.2f}")
    memory = beside(model, lambda row: format_bytes(row["peak_bytes"]))
    return [title, *medians, ratio, load, memory, str(len(model["slow_kernels"]))]


def beside(model: Report, cell: Callable[[Report], str]) -> str:
    """Our figure, and that of ONNX Runtime where it ran: what is loaded to run a model everywhere else."""
    other = row_of(model, "onnxruntime")
    return cell(model["rows"][0]) + ("" if other is None else f", onnxruntime {cell(other)}")


def milliseconds(row: Report | None, allowed: float) -> str:
    if row is None:
        return "none"
    median = row["median"] * 1e3
    text = f"{median:.1f}" if median >= 10 else f"{median:.2f}"
    return text if row["error"] <= allowed else f"{text} (wrong result)"
