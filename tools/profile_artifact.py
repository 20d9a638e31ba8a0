"""Show where an artifact's time goes: each kernel's time, its share of what this machine can do, its schedule rule and
configuration, and which kernels are slow.

The machine's roofs are measured in the same run: multiply-adds, bytes read from each cache and from memory, and the
time of a kernel that does nothing. A kernel is slow when its rule is the generic one, or when it reaches under 20 % of
the nearer of its own roofs and takes over 2 % of the time. Times are lower quartiles over the rounds, and where one
looks slow there are more rounds (see `graphopt.tools.profiling.measuring`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from graphopt.runtime.manifest import SLOW, WHY
from graphopt.tools.benchmarking.usage import Interference, interference, read_usage
from graphopt.tools.model_argument import check_artifact, is_artifact
from graphopt.tools.output_file import check_suffix
from graphopt.tools.progress import progress
from graphopt.tools.subject import add_entry_option, add_size_options, choose_entry, chosen_sizes, open_artifact
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.tools.profiling.roofs import RoofMeter, Roofs
    from graphopt.tools.profiling.shares import Profile, Row

SUMMARY = "show each kernel's time, its share of the machine's roofs, and which are slow"
CHART = ".png"
WORDS = (WHY, SLOW)  # of configurations that have lines of their own
BUSY = 0.1  # share of the CPUs that others may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a .gopt file or folder")
    parser.add_argument("--threads", type=int, help="(default: one for each CPU)")
    parser.add_argument(
        "--rounds", type=int, default=20, help="runs at a time, of which there are several (default 20)"
    )
    parser.add_argument("--chart", metavar=f"FILE{CHART}", help="draw the kernels' times and shares of their roofs")
    parser.add_argument("--fail-on-slow", action="store_true", help="exit 1 when a kernel is slow")
    add_entry_option(parser)
    add_size_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt.errors import UsageError
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.profiling.measuring import measure

    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} measures nothing; give at least 1")
    if arguments.chart is not None:
        check_chart(arguments.chart)
    check_artifact(arguments.artifact)
    if not is_artifact(arguments.artifact):
        raise UsageError(f"{arguments.artifact} is not an artifact; make one with graphopt compile MODEL -o model.gopt")
    subject = open_artifact(arguments.artifact, arguments.entry)
    feed = subject.draw(chosen_sizes(arguments, subject.inputs), arguments.seed)
    session = InferenceSession(arguments.artifact, threads=arguments.threads)
    entry = choose_entry(session, arguments.entry)
    meter, missing = find_meter(session.threads)
    cores = sorted(os.sched_getaffinity(0))
    before = read_usage(cores, ())
    with progress("measuring the kernels"):
        profile, sizes = measure(session, feed, entry, arguments.rounds, meter)
    others = interference(before, read_usage(cores, ()), cores)
    notes = [note for note in (missing, *doubts(profile, others)) if note]
    about = {"artifact": session.manifest.name, "entry": entry, "sizes": sizes, "threads": session.threads}
    write_json(arguments, {**about, **profile.to_json(), "interference": asdict(others), "notes": notes})
    if wants_text(arguments):
        print_profile(profile, notes)
    if arguments.chart is not None:
        from graphopt.tools.profiling.chart import write_chart

        write_chart(arguments.chart, profile, describe(about))
    return 1 if arguments.fail_on_slow and profile.slow else 0


def check_chart(path: str) -> None:
    """Before the work: the file's name, and that the package that draws is installed."""
    check_suffix(path, (CHART,))
    import matplotlib  # noqa: F401 - where it is missing, the command line names the extra


def find_meter(threads: int) -> tuple[RoofMeter | None, str]:
    """What measures the roofs, or why nothing can: where the compiler is not installed, times and rules are shown."""
    from graphopt.errors import CompileError, MissingExtraError
    from graphopt.tools.profiling.roofs import RoofMeter

    try:
        return RoofMeter(threads), ""
    except (CompileError, MissingExtraError) as e:
        return None, f"no shares of the machine's roofs: {e}"


def doubts(profile: Profile, others: Interference) -> Iterator[str]:
    """What the reader must know before trusting the figures."""
    taken = others.elsewhere + others.stolen
    if taken > BUSY:
        yield f"others took {taken:.0%} of the CPUs, so times are too long; run again on a quiet machine"
    if any((row.share_of_roof or 0) > 1 for row in profile.rows):
        yield "a share over 100 % was faster than its roof was when measured: the clock changed, or others ran"


def describe(about: Mapping[str, Any]) -> str:
    """The model, its sizes and threads in one line."""
    sizes = "".join(f", {name} {size}" for name, size in about["sizes"].items())
    entry = "" if about["entry"] == "main" else f", entry {about['entry']}"
    return f"{about['artifact']}{entry}{sizes}, {about['threads']} thread{'s' * (about['threads'] > 1)}"


def print_profile(profile: Profile, notes: list[str]) -> None:
    print(format_table([cells(row) for row in profile.rows]))
    print()
    outside = (
        f"{profile.outside_seconds * 1e6:.0f} us ({profile.outside_seconds / profile.seconds:.1%}) outside kernels"
    )
    print(f"model  {profile.seconds * 1e3:.3f} ms, of it {outside}")
    speed = f"{profile.flops / 1e9:.3f} GFLOP, {profile.flops / profile.seconds / 1e9:.1f} GFLOP/s"
    if profile.roofs is None:
        print(f"work   {speed}")
    else:
        print(f"work   {speed}, {profile.share_of_peak:.1%} of the FMA peak")
        print(f"roofs  {format_roofs(profile.roofs)}")
    for note in notes:
        print(f"note   {note}")
    for row in profile.rows:
        if WHY in row.configuration:
            print(f"why    {row.kernel}: {row.configuration[WHY]}")
    print(f"slow   {len(profile.slow)} of {len(profile.rows)} kernels")
    for row in profile.slow:
        print(f"       {row.kernel}: {row.slow}")


def format_roofs(roofs: Roofs) -> str:
    reads = ", ".join(f"{level.name} {level.bytes_per_second / 1e9:.0f}" for level in roofs.levels)
    return (
        f"FMA {roofs.flops_per_second / 1e9:.0f} GFLOP/s; reading GB/s: {reads}; "
        f"an empty kernel takes {roofs.launch_seconds * 1e6:.1f} us"
    )


def cells(row: Row) -> dict[str, Any]:
    """One line of the table; the rate is that of the nearer roof."""
    return {
        "kernel": row.kernel,
        "calls": f"{row.calls:g}",
        "us a call": f"{row.seconds_per_call * 1e6:.1f}",
        "of time": f"{row.share:.1%}",
        "rate": format_rate(row),
        "of roof": "" if row.share_of_roof is None else f"{row.share_of_roof:.0%} {row.roof}",
        "": "SLOW" if row.slow else "",
        "rule": row.rule,
        "configuration": " ".join(f"{name}={value}" for name, value in row.configuration.items() if name not in WORDS),
    }


def format_rate(row: Row) -> str:
    from graphopt.tools.profiling.shares import rate

    flops, read = rate(row.flops, row), rate(row.bytes, row)
    if flops and (row.roof == "FMA" or not read):
        return f"{flops / 1e9:.1f} GFLOP/s"
    return f"{read / 1e9:.1f} GB/s" if read else ""


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
