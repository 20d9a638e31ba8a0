"""Time a model or artifact, alone or beside other runtimes: each in its own process, in turns, on the same cores; or
a whole suite: of models, in float32 or quantized, of kernels, or of models with fewer blocks, gates, exits or codes.

A row is valid when the side was as fast in turns as alone (within 5 %) and others took under 10 % of the CPUs; only
valid rows are worth quoting.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.tools.benchmarking.comparison import Settings, choose_cores, compare, compile_to
from graphopt.tools.benchmarking.peers import ALL, PEERS, check_artifacts, check_peers, peer_entrants
from graphopt.tools.benchmarking.report import format_notes, format_rows
from graphopt.tools.benchmarking.turns import PATIENCE, Entrant, Failure
from graphopt.tools.model_argument import HELP_ARTIFACT, add_capture_options, capture_model, is_artifact
from graphopt.tools.progress import progress
from graphopt.tools.subject import add_size_options, chosen_sizes, open_artifact, program_subject
from graphopt.tools.table import add_json_option, wants_text, write_json
from graphopt.tools.tuning.options import NONE, Tuning, add_tuning_options

SUMMARY = "time a model, an artifact or a suite, alone or against other runtimes"
DTYPES = ("f32", "bf16")
SUITES = (
    "e2e",
    "kernels",
    "folding",
    "gating",
    "exits",
    "int8",
    "quantization",
    "gemv",
    "decode",
    "overhead",
    "opening",
)
TUNED = ("e2e", "kernels", "int8", "gemv")  # suites whose kernels may be tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|ARTIFACT", nargs="?", help=f"{HELP_ARTIFACT} (compiled at O2)")
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="in place of MODEL: whole models, kernels, or models with fewer blocks, gates or early exits, or in int8",
    )
    against = (
        f"what to compare with: {', '.join(PEERS)}, {ALL} for those installed (default for --suite e2e and int8), "
        "or other artifacts, such as before.gopt"
    )
    parser.add_argument("--against", metavar="NAME,...", help=against)
    parser.add_argument("--model", dest="source", metavar="MODEL", help="what the others run when timing an ARTIFACT")
    parser.add_argument("--models", metavar="NAME,...", help="some models of the suite, or kernels or kinds of them")
    parser.add_argument("--rounds", type=int, default=15, help="turns of 0.2 s for each side (default 15)")
    parser.add_argument("--threads", type=int, help="threads and cores for each side (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="what all sides multiply in (default f32)")
    timeout = f"how long a side may take to open its model, autotuning included (default {PATIENCE:g})"
    parser.add_argument("--peer-timeout", type=float, metavar="SECONDS", default=PATIENCE, help=timeout)
    parser.add_argument("--chart", metavar="FILE.png", help="draw what a suite found")
    parser.add_argument("--markdown", metavar="FILE", help="write what a suite found as a table for a README")
    add_tuning_options(parser, NONE)
    add_capture_options(parser)
    add_size_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    check_combination(arguments)
    tuning = Tuning(arguments.tune, arguments.database or NONE)
    cores = choose_cores(arguments.threads)
    settings = Settings(cores, arguments.rounds, arguments.peer_timeout, arguments.dtype, tuning)
    if arguments.suite is not None:
        from graphopt.tools.benchmarking.suites import run_suite

        return run_suite(arguments, settings)
    artifacts, names = check_artifacts(arguments.against or "")
    peers = check_peers(names, settings.dtype)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        report = benchmark(arguments, peers, artifacts, settings, Path(folder))
    write_json(arguments, report)
    if wants_text(arguments):
        print(format_notes(report))
        print(format_rows(report))
    nobody = bool(arguments.against) and len(report["rows"]) == 1
    return 1 if nobody or not report["agree"] else 0


def check_combination(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options that mean nothing together."""
    if (arguments.model is None) == (arguments.suite is None):
        raise UsageError("give either MODEL or --suite, one of them and not both")
    tuned = arguments.tune is not None or arguments.database is not None
    if tuned and (arguments.suite not in (None, *TUNED) or is_artifact(arguments.model or "")):
        what = f"--suite {arguments.suite}" if arguments.suite else "an artifact, which is compiled already"
        raise UsageError(f"--tune and --database have no effect on {what}; leave them out")
    if arguments.suite is None:
        if arguments.dtype != "f32" and is_artifact(arguments.model):
            raise UsageError(f"{arguments.model} is compiled already; --dtype belongs to a model")
        for option in ("models", "chart", "markdown"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option} belongs to --suite; leave it out, or use --json for one model's figures")
    elif arguments.suite != "e2e" and arguments.dtype != "f32":
        raise UsageError(
            f"--suite {arguments.suite} has a dtype of its own; --dtype belongs to --suite e2e or a MODEL, leave it out"
        )
    elif arguments.source or arguments.dynamic or arguments.examples or arguments.size or arguments.shape:
        raise UsageError(
            "a suite brings its own models and inputs; leave out --model, --dynamic, --examples, --size and --shape"
        )


def benchmark(
    arguments: argparse.Namespace, peers: list[str], artifacts: list[Entrant], settings: Settings, folder: Path
) -> dict[str, Any]:
    """The report of one comparison; compiles and exports into `folder` what is not there yet."""
    source = arguments.source or (None if is_artifact(arguments.model) else arguments.model)
    if peers and source is None:
        raise UsageError(f"{peers[0]} cannot run an artifact; say which model it came from with --model MODEL")
    entrants, reference = [Entrant("graphopt", arguments.model)], None
    failures: list[Failure] = []
    if source is not None:
        with progress(f"capturing {source}"):
            program = capture_model(source, arguments)
        reference = program_subject(program)
        if not is_artifact(arguments.model):
            with progress("compiling"):
                entrants = [Entrant("graphopt", compile_to(program, folder, settings))]
        with progress("exporting for the others"):
            others, failures = peer_entrants(program, peers, folder, settings.dtype)
            entrants += others
    entrants += artifacts
    subject = reference or open_artifact(arguments.model)
    feed = subject.draw(chosen_sizes(arguments, subject.inputs), arguments.seed)
    expected = None if reference is None else list(reference.run(feed).values())
    with progress("measuring"):
        return compare(entrants, failures, feed, expected, settings)


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
