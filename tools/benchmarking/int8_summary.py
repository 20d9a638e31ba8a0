"""What `--suite int8` says of its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.tools.benchmarking.report import format_machine, format_rows
from graphopt.tools.benchmarking.summary import format_mean, format_ratio, format_sides, row_of
from graphopt.tools.table import format_table

Report = Mapping[str, Any]

FLOAT = "graphopt-f32"
UNFUSED = "PyTorch"
COSINE, SAME = 0.9999, 0.995  # asked of the mean cosine, and of the share of inputs with the same first choice
SPREAD = 1.25  # times the distance of PyTorch's float32 run of the same file, which rounding alone explains


def is_right(model: Report) -> bool:
    """It ran, nothing fell back, and it is as close to ONNX Runtime as is asked, or as PyTorch comes in float32."""
    return (
        "failed" not in model and not model["fallbacks"] and (meets(model["agreement"]["graphopt"]) or as_float(model))
    )


def meets(agreement: Report) -> bool:
    return bool(agreement["mean_cosine"] >= COSINE and agreement["same_first"] >= SAME)


def as_float(model: Report) -> bool:
    ours, unfused = model["agreement"]["graphopt"], model["agreement"][UNFUSED]
    apart = 1 / model["agreement_inputs"]
    return bool(
        1 - ours["mean_cosine"] <= SPREAD * max(1 - unfused["mean_cosine"], 1 - COSINE)
        and 1 - ours["same_first"] <= SPREAD * max(1 - unfused["same_first"], 1 - SAME) + apart
    )


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    lines = [model["configuration"], format_rows({**model, "agree": True})]
    left, fallbacks = model["conversions"], model["fallbacks"]
    lines.append(
        f"{sum(left.values()) + sum(fallbacks.values())} conversions are left, {sum(fallbacks.values())} at a fallback"
    )
    lines += [f"  {count} x {reason}" for reason, count in (*fallbacks.items(), *left.items())]
    lines += [f"{side}: {describe_agreement(found)}" for side, found in model["agreement"].items()]
    lines.append(f"over {model['agreement_inputs']} inputs, from {model['reference']}")
    return "\n".join(lines)


def describe_agreement(found: Report) -> str:
    return (
        f"cosine {found['mean_cosine']:.6f} (least {found['least_cosine']:.6f}), "
        f"first choice the same in {found['same_first']:.1%}"
    )


def format_head(report: Report) -> str:
    return (
        f"{format_machine(report)}, batch 1; {report['rounds']} turns of {report['turn_seconds']:g} s each, the others "
        "stopped; QDQ files of ONNX Runtime's quantizer, per channel, uint8 activations"
    )


def format_suite(report: Report) -> str:
    rows = [cells(model) for model in report["models"]]
    about = [format_head(report), *format_sides(report)]
    return "\n".join(
        [*about, "", format_table(rows, list(cells({"title": "", "failed": ""}))), format_mean(report["summary"])]
    )


def cells(model: Report) -> dict[str, str]:
    """A row of the summary."""
    if "failed" in model:
        names = ("graphopt ms", "best peer", "its ms", "ratio", "f32 ms", "over f32", "left", "fallbacks")
        return {"model": model["title"], **dict.fromkeys(names, ""), "cosine": "", "same first": "", "valid": "failed"}
    best, floating = row_of(model, model["best_peer"]), row_of(model, FLOAT)
    ours, unfused = model["agreement"]["graphopt"], model["agreement"][UNFUSED]
    return {
        "model": model["title"],
        "graphopt ms": milliseconds(model["rows"][0]),
        "best peer": model["best_peer"] or "",
        "its ms": milliseconds(best),
        "ratio": format_ratio(model),
        "f32 ms": milliseconds(floating),
        "over f32": "" if model["over_float"] is None else f"{model['over_float']:.2f}x",
        "left": str(sum(model["conversions"].values())),
        "fallbacks": str(sum(model["fallbacks"].values())),
        "cosine": f"{ours['mean_cosine']:.5f} ({UNFUSED} {unfused['mean_cosine']:.5f})",
        "same first": f"{ours['same_first']:.1%} ({UNFUSED} {unfused['same_first']:.1%})",
        "valid": "yes" if model["valid"] else "no",
    }


def milliseconds(row: Report | None) -> str:
    return "" if row is None else f"{row['median'] * 1e3:.2f}"


def format_markdown(report: Report) -> str:
    columns = list(cells({"title": "", "failed": ""}))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells(model).values()) + " |" for model in report["models"]]
    notes = [f"{format_head(report)}.", f"{format_mean(report['summary'])}.", ""]
    notes += [f"- {line}" for line in format_sides(report)]
    for model in report["models"]:
        left = {**model.get("fallbacks", {}), **model.get("conversions", {})}
        notes += [f"- {model['title']}: {count} x {reason}" for reason, count in left.items()]
    return "\n".join([*lines, "", *notes]) + "\n"
