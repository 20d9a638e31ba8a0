"""Show where an artifact's time goes: each kernel's share, the schedule rule that made it, and which are slow."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from graphopt.tools.model_argument import check_artifact, is_artifact
from graphopt.tools.progress import progress
from graphopt.tools.subject import add_entry_option, add_size_options, choose_entry, chosen_sizes, open_artifact
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

SUMMARY = "show each kernel's time and schedule rule"
GENERIC = "generic"  # the rule of kernels that nothing better took
NOTABLE = 0.02  # share of the time below which a slow kernel does not matter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a .gopt file or folder")
    parser.add_argument("--threads", type=int, help="(default: one for each CPU)")
    parser.add_argument("--rounds", type=int, default=20, help="runs to take the median of (default 20)")
    add_entry_option(parser)
    add_size_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt.errors import UsageError
    from graphopt.runtime.session import InferenceSession

    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} measures nothing; give at least 1")
    check_artifact(arguments.artifact)
    if not is_artifact(arguments.artifact):
        raise UsageError(f"{arguments.artifact} is not an artifact; make one with graphopt compile MODEL -o model.gopt")
    subject = open_artifact(arguments.artifact, arguments.entry)
    feed = subject.draw(chosen_sizes(arguments, subject.inputs), arguments.seed)
    session = InferenceSession(arguments.artifact, threads=arguments.threads)
    with progress("measuring"):
        times = session.profile(feed, choose_entry(session, arguments.entry), arguments.rounds)
    rows = kernel_rows(times, session.variant.kernels)
    write_json(arguments, {"seconds": sum(row["seconds"] for row in rows), "kernels": rows})
    if wants_text(arguments):
        print_rows(rows)
    return 0


def kernel_rows(times: Mapping[str, tuple[float, float]], rules: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a kernel, the most expensive first; `slow` marks generic schedules over 2 % of the time."""
    total = sum(calls * seconds for calls, seconds in times.values()) or 1.0
    rows = [
        {
            "kernel": name,
            "rule": rules.get(name, "runtime"),
            "calls": calls,
            "seconds_per_call": seconds,
            "seconds": calls * seconds,
            "share": calls * seconds / total,
            "slow": rules.get(name) == GENERIC and calls * seconds / total > NOTABLE,
        }
        for name, (calls, seconds) in times.items()
    ]
    return sorted(rows, key=lambda row: -float(row["seconds"]))


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = [
        {
            "kernel": row["kernel"],
            "rule": row["rule"],
            "calls": row["calls"],
            "us per call": f"{row['seconds_per_call'] * 1e6:.1f}",
            "us": f"{row['seconds'] * 1e6:.1f}",
            "share": f"{row['share']:.1%}",
            "": "slow" if row["slow"] else "",
        }
        for row in rows
    ]
    print(format_table(table))
    slow = [row for row in rows if row["slow"]]
    print(f"total {sum(row['seconds'] for row in rows) * 1e3:.3f} ms, {len(slow)} slow kernels over {NOTABLE:.0%}")


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
