"""Time a model or artifact, alone or beside another runtime: each in its own process, in turns, on the same cores.

A row is valid when the side was as fast in turns as alone (within 5 %) and others took under 10 % of the CPUs; only
valid rows are worth quoting.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.tools.benchmarking.peers import check_peers, export_for_peers
from graphopt.tools.benchmarking.report import build_report, format_notes, format_rows
from graphopt.tools.benchmarking.turns import Entrant, take_turns
from graphopt.tools.model_argument import HELP_ARTIFACT, add_dynamic_option, capture_model, is_artifact
from graphopt.tools.progress import progress
from graphopt.tools.subject import Subject, add_size_options, chosen_sizes, open_artifact, program_subject
from graphopt.tools.table import add_json_option, wants_text, write_json

SUMMARY = "time a model or artifact, alone or against another runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|ARTIFACT", help=f"{HELP_ARTIFACT} (compiled at O2)")
    parser.add_argument("--against", metavar="NAME,...", default="", help="runtimes to compare with: onnxruntime")
    parser.add_argument("--model", dest="source", metavar="MODEL", help="what the others run when timing an ARTIFACT")
    parser.add_argument("--rounds", type=int, default=15, help="turns of 0.2 s for each side (default 15)")
    parser.add_argument("--threads", type=int, help="threads and cores for each side (default: all)")
    add_dynamic_option(parser)
    add_size_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    peers = check_peers(arguments.against)
    cores = choose_cores(arguments.threads)
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} measures nothing; give at least 1")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        report = benchmark(arguments, peers, cores, Path(folder))
    write_json(arguments, report)
    if wants_text(arguments):
        print(format_notes(report))
        print(format_rows(report))
    return 0 if report["agree"] else 1


def benchmark(arguments: argparse.Namespace, peers: list[str], cores: list[int], folder: Path) -> dict[str, Any]:
    """The report of one comparison; compiles and exports into `folder` what is not there yet."""
    source = arguments.source or (None if is_artifact(arguments.model) else arguments.model)
    if peers and source is None:
        raise UsageError(f"{peers[0]} cannot run an artifact; say which model it came from with --model MODEL")
    entrants, reference = [Entrant("graphopt", arguments.model)], None
    if source is not None:
        with progress(f"capturing {source}"):
            program = capture_model(source, arguments.dynamic)
        reference = program_subject(program)
        if not is_artifact(arguments.model):
            with progress("compiling"):
                entrants = [Entrant("graphopt", compile_to(program, folder))]
        with progress("exporting for the others"):
            entrants += [Entrant(peer, export_for_peers(program, folder)) for peer in peers]
    subject = reference or open_artifact(arguments.model)
    sizes = chosen_sizes(arguments, subject.inputs)
    return measure(entrants, subject, reference, sizes, arguments.seed, cores, arguments.rounds)


def measure(
    entrants: list[Entrant],
    subject: Subject,
    reference: Subject | None,
    sizes: dict[str, int],
    seed: int,
    cores: list[int],
    rounds: int,
) -> dict[str, Any]:
    """Time the entrants on inputs drawn from `subject`; errors are against `reference`, else the first entrant."""
    feed = subject.draw(sizes, seed)
    expected = None if reference is None else list(reference.run(feed).values())
    with progress("measuring"):
        measurements, others = take_turns(entrants, feed, cores, rounds)
    return build_report(measurements, others, feed, expected, cores, rounds)


def compile_to(program: Any, folder: Path) -> str:
    import graphopt

    path = str(folder / "model.gopt")
    graphopt.compile(graphopt.optimize(program, "O2").program).save(path)
    return path


def choose_cores(threads: int | None) -> list[int]:
    """The first `threads` CPUs this process may use; raises UsageError when there are fewer."""
    available = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(available):
        raise UsageError(f"--threads {threads} is not possible; this process may use 1 to {len(available)} CPUs")
    return available[:threads]


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
