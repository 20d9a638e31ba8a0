"""`graphopt tune MODEL --budget SECONDS`: measure configurations of a model's kernels, here or on other devices."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.benchmarking.usage import Usage, interference, read_usage
from graphopt.tools.model_argument import HELP, add_capture_options, load_model
from graphopt.tools.pass_options import add_pass_choice, chosen_recipe, optimize_settings
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.backends.tuner.session import Outcome, Row

BUDGET = 60.0  # seconds
BUSY = 0.1  # share of the CPUs that others may take
DROPPED = 5  # candidates that are named
OPTIONS = (
    *("target", "budget", "threads", "seed", "rpc", "key"),
    *("dynamic", "examples", "passes", "recipe", "level", "data", "metric"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tuning")
    group.add_argument("model", metavar="MODEL", nargs="?", help=HELP)
    group.add_argument("--target", help="see `graphopt list-targets` (default cpu)")
    group.add_argument("--budget", metavar="SECONDS", type=float, help=f"(default {BUDGET:g})")
    group.add_argument("--threads", type=int, help="threads to cut work for (default: one for each CPU)")
    help = "of the order in which candidates are tried, and of the inputs they are measured with (default 0)"
    group.add_argument("--seed", type=int, help=help)
    help = "measure on the devices of a tracker, `python -m tvm.exec.rpc_tracker`, in place of this machine"
    group.add_argument("--rpc", metavar="HOST:PORT", help=help)
    group.add_argument("--key", help="with --rpc: the key of the devices' servers, `python -m tvm.exec.rpc_server`")
    add_capture_options(parser)
    add_pass_choice(parser)


def devices(arguments: argparse.Namespace) -> tuple[str, str] | None:
    """The tracker and the key of its devices; None for this machine. Raises UsageError for one without the other."""
    if (arguments.rpc is None) != (arguments.key is None):
        given, missing = ("--key", "--rpc HOST:PORT") if arguments.rpc is None else ("--rpc", "--key KEY")
        raise UsageError(f"{given} has no effect without {missing}; give both or neither")
    return None if arguments.rpc is None else (arguments.rpc, arguments.key)


def run(arguments: argparse.Namespace) -> int:
    rpc = devices(arguments)
    from graphopt import optimize
    from graphopt.backends.tuner.measuring import DeviceLostError
    from graphopt.backends.tuner.store import Store
    from graphopt.tuning import tune

    recipe = chosen_recipe(arguments)
    settings = {"target": "cpu"} | optimize_settings(recipe)
    store = Store.user() if arguments.store is None else Store(arguments.store)
    with progress(f"capturing {arguments.model}"):
        program = load_model(arguments)
    with progress("optimizing"):
        result = optimize(program, [step.item for step in recipe.passes], **settings)
    cores = sorted(os.sched_getaffinity(0))
    before = usage(cores)
    try:
        with progress(f"tuning for {settings['target']}"):
            outcome = tune(
                result.program,
                settings["target"],
                seconds=BUDGET if arguments.budget is None else arguments.budget,
                database=store,
                threads=arguments.threads,
                seed=settings.get("seed", 0),
                rpc=rpc,
            )
    except (KeyboardInterrupt, DeviceLostError):
        print(f"graphopt: what was found so far is in {store.path}", file=sys.stderr)
        raise
    taken = interference(before, usage(cores), cores)
    notes = list(doubts(outcome, taken.elsewhere + taken.stolen if rpc is None else 0.0))
    rows = [to_json(row) for row in outcome.rows]
    write_json(arguments, {"store": str(store.path), "workloads": rows, "dropped": outcome.failures, "notes": notes})
    if wants_text(arguments):
        print(format_table([cells(row) for row in outcome.rows]))
        print()
        print(f"{summary(outcome)} in {store.path}")
        for note in notes:
            print(f"note   {note}")
    return 0


def usage(cores: list[int]) -> Usage:
    """Children that have ended count as our own."""
    found, times = read_usage(cores, ()), os.times()
    return replace(found, own=found.own + times.children_user + times.children_system)


def doubts(outcome: Outcome, taken: float) -> list[str]:
    """What was dropped, and what the reader must know before trusting the figures."""
    found = [f"dropped {failure}" for failure in outcome.failures[:DROPPED]]
    if more := len(outcome.failures) - DROPPED:
        found += [f"dropped {more} more; --json lists all"] if more > 0 else []
    if taken > BUSY:
        found.append(f"others took {taken:.0%} of the CPUs; tune again on a quiet machine to be sure")
    return found


def gain(row: Row) -> float | None:
    """Of the default's time, what is saved as a factor: 1.1 is a tenth faster."""
    return None if row.seconds is None or row.default_seconds is None else row.default_seconds / row.seconds


def to_json(row: Row) -> dict[str, Any]:
    return {
        "workload": row.workload.to_json(),
        "kernels": list(row.kernels),
        "share": row.share,
        "tried": row.tried,
        "space": row.space,
        "default_seconds": row.default_seconds,
        "seconds": row.seconds,
        "gain": gain(row),
        "configuration": dict(row.configuration),
        "measured_now": row.new,
    }


def cells(row: Row) -> dict[str, Any]:
    """One line of the table; empty where nothing was measured."""
    found = gain(row)
    return {
        "of time": f"{row.share:.1%}",
        "tried": f"{row.tried}/{row.space}",
        "default us": "" if row.default_seconds is None else f"{row.default_seconds * 1e6:.1f}",
        "best us": "" if row.seconds is None else f"{row.seconds * 1e6:.1f}",
        "gain": "" if found is None else f"{found:.2f}x",
        "workload": str(row.workload),
        "configuration": " ".join(f"{name}={value}" for name, value in row.configuration.items())
        if found is not None and found > 1
        else "",
    }


def summary(outcome: Outcome) -> str:
    """How many workloads gained, and what that makes of the kernels' time."""
    gained = [row for row in outcome.rows if (gain(row) or 1) > 1]
    saved = sum(row.share * (1 - 1 / (gain(row) or 1)) for row in gained)
    measured = sum(row.seconds is not None for row in outcome.rows)
    total = len(outcome.rows)
    return f"{len(gained)} of {total} workloads faster, by {saved:.1%} of the kernels' time; {measured} measured, kept"


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options that mean nothing without a model."""
    for name in OPTIONS:
        if getattr(arguments, name) not in (None, []):
            option = "-O" if name == "level" else f"--{name}"
            raise UsageError(f"{option} has no effect without MODEL; name one or leave it out")
