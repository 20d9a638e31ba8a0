"""What the suite of kernels comes to, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.tools.benchmarking.report import AGREE, format_machine
from graphopt.tools.table import format_table

Report = Mapping[str, Any]
COLUMNS = ("kernel", "us", "torch us", "torch/us", "rate", "of roof", "rule", "error", "valid")


def summarize(kernels: Sequence[Report]) -> dict[str, Any]:
    """`minilm_share_of_peak`: all matrix products of one run of MiniLM, each weighted by its time.

    `smallest_ratio` is torch's time over ours where that is smallest among the matrix products; None without any.
    """
    measured = [kernel for kernel in kernels if "failed" not in kernel]
    minilm = [kernel for kernel in measured if kernel["calls"]]
    products = [kernel for kernel in measured if kernel["kind"] == "gemm"]
    smallest = min(products, key=lambda kernel: float(kernel["ratio"]), default=None)
    seconds = sum(kernel["calls"] * kernel["seconds"] for kernel in minilm)
    at_peak = sum(kernel["calls"] * kernel["flops"] / kernel["peak"] for kernel in minilm)
    return {
        "minilm_share_of_peak": at_peak / seconds if minilm else None,
        "minilm_seconds": seconds if minilm else None,
        "minilm_shapes": len(minilm),
        "smallest_ratio": None if smallest is None else {"kernel": smallest["name"], "ratio": smallest["ratio"]},
        "valid": all(kernel["valid"] for kernel in (*minilm, *products)),
    }


def is_right(kernel: Report) -> bool:
    return "failed" not in kernel and bool(kernel["error"] <= AGREE)


def cells(kernel: Report) -> dict[str, Any]:
    if "failed" in kernel:
        return {"kernel": kernel["name"], "rule": "failed"}
    return {
        "kernel": kernel["name"],
        "us": f"{kernel['seconds'] * 1e6:.1f}",
        "torch us": f"{kernel['torch_seconds'] * 1e6:.1f}",
        "torch/us": f"{kernel['ratio']:.2f}x",
        "rate": format_rate(kernel),
        "of roof": "" if kernel["roof"] is None else f"{kernel['share_of_roof']:.0%} {kernel['roof']}",
        "rule": ", ".join(kernel["rules"]),
        "error": f"{kernel['error']:.1e}",
        "valid": kernel["valid"],
    }


def format_rate(kernel: Report) -> str:
    if kernel["roof"] in (None, "FMA"):
        return f"{kernel['flops'] / kernel['seconds'] / 1e9:.1f} GFLOP/s"
    return f"{kernel['bytes'] / kernel['seconds'] / 1e9:.1f} GB/s"


def format_kernel(kernel: Report) -> str:
    """One kernel in a line."""
    if "failed" in kernel:
        return f"{kernel['name']} failed: {kernel['failed']}"
    shown = cells(kernel)
    valid = "" if kernel["valid"] else ", not valid"
    return (
        f"{shown['kernel']}: {shown['us']} us ({shown['rate']}, {shown['of roof']}), "
        f"torch {shown['torch us']} us ({shown['torch/us']}), {shown['rule']}{valid}"
    )


def format_head(report: Report) -> str:
    roofs = report["roofs"]
    reads = ", ".join(f"{level['name']} {level['bytes_per_second'] / 1e9:.0f}" for level in roofs["levels"])
    return (
        f"{format_machine(report)}; "
        f"{report['rounds']} turns of {report['turn_seconds']:g} s each; FMA peak "
        f"{roofs['flops_per_second'] / 1e9:.0f} GFLOP/s (measured again beside each kernel); reading GB/s: {reads}"
    )


def format_total(summary: Report) -> str:
    lines = []
    if summary["minilm_share_of_peak"] is not None:
        lines.append(
            f"matrix products of MiniLM at 128 tokens ({summary['minilm_shapes']} shapes): "
            f"{summary['minilm_seconds'] * 1e3:.2f} ms, {summary['minilm_share_of_peak']:.1%} of the FMA peak"
        )
    if summary["smallest_ratio"] is not None:
        smallest = summary["smallest_ratio"]
        lines.append(f"torch / graphopt over matrix products: at least {smallest['ratio']:.2f}x ({smallest['kernel']})")
    if lines and not summary["valid"]:
        lines.append("not valid: a row was disturbed")
    return "\n".join(lines)


def format_suite(report: Report) -> str:
    table = format_table([cells(kernel) for kernel in report["kernels"]], COLUMNS)
    return "\n".join(part for part in (format_head(report), table, format_total(report["summary"])) if part)


def format_markdown(report: Report) -> str:
    """A table for a README, then what was measured and how."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for kernel in report["kernels"]:
        shown = cells(kernel) | ({} if "failed" in kernel else {"valid": "yes" if kernel["valid"] else "no"})
        lines.append("| " + " | ".join(str(shown.get(column, "")) for column in COLUMNS) + " |")
    return "\n".join([*lines, "", f"{format_head(report)}.", "", format_total(report["summary"])]).rstrip() + "\n"
