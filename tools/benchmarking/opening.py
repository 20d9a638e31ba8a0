"""`--suite opening`: from the start of a fresh process to a session that is ready, and the memory it took until then.

Sides take turns, one process at a time; the first turn of each, which reads the files from the disk, is dropped.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.errors import RunError
from graphopt.tools.benchmarking.comparison import Settings, compile_to
from graphopt.tools.benchmarking.networks import Network, Publish, Report, format_suite, format_tables, run_networks
from graphopt.tools.benchmarking.peers import installed, peer_entrants
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

__all__ = ["format_markdown", "format_model", "format_suite", "is_right", "run_opening"]

CODE, FULL, PEER = 'graphopt, verify="code"', 'graphopt, verify="full"', "onnxruntime"
WANTED = {CODE: 0.6, FULL: 1.0}  # of ONNX Runtime's time; of its memory 1.0
_READY = """
import time
ready = time.monotonic()
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(ready, peak, "torch" in sys.modules, flush=True)
os._exit(0)
"""
_OURS = """
import os, sys
os.sched_setaffinity(0, {cores})
from graphopt.runtime.session import InferenceSession
session = InferenceSession({path!r}, threads={threads}, verify={verify!r})
"""
_PEER = """
import os, sys
os.sched_setaffinity(0, {cores})
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class OpeningCase:
    """A model of `--suite e2e`, by name."""

    title: str
    model: str


CASES: Mapping[str, OpeningCase] = {"minilm": OpeningCase("opening MiniLM", "minilm")}


def run_opening(cases: Mapping[str, OpeningCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each case."""
    networks: list[Network] = [
        ({"name": name, "title": case.title}, partial(measure_case, case, settings)) for name, case in cases.items()
    ]
    run_networks("opening", networks, settings, publish)


def measure_case(case: OpeningCase, settings: Settings) -> dict[str, Any]:
    import graphopt
    from graphopt.tools.benchmarking.models import MODELS

    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        with progress(f"{case.title}: compiling"):
            module, examples = MODELS[case.model].build()
            program = graphopt.capture(module, examples, name=case.model)
            artifact = compile_to(program, folder, settings)
        others, failures = peer_entrants(program, [PEER] if installed(PEER) else [], folder)
        cores = {"cores": list(settings.cores), "threads": len(settings.cores)}
        sides = {
            CODE: _OURS.format(path=artifact, verify="code", **cores),
            FULL: _OURS.format(path=artifact, verify="full", **cores),
        }
        if others:
            sides[PEER] = _PEER.format(path=others[0].model, **cores)
        with progress(f"{case.title}: measuring"):
            return measure(sides, settings.rounds) | {"failures": [failure.reason for failure in failures]}


def measure(sides: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Medians of what each side's code takes: seconds, and bytes at the most."""
    found: dict[str, list[tuple[float, int]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, code in sides.items():
            taken = open_once(code)
            if turn:
                found[side].append(taken)
    return {
        "rows": [
            {
                "side": side,
                "seconds": statistics.median(seconds for seconds, _ in taken),
                "bytes": statistics.median(size for _, size in taken),
            }
            for side, taken in found.items()
        ]
    }


def open_once(code: str) -> tuple[float, int]:
    """Seconds from before the process is there to the session, and the most bytes that it had. Raises RunError.

    Byte code of the modules is kept, as that of installed packages is.
    """
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code + _READY], capture_output=True, text=True, env=environment)
    words = done.stdout.split()
    if done.returncode or len(words) != 3:
        raise RunError(f"a side could not open its model: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    if words[2] == "True":
        raise RunError("a side imported torch, which nothing needs that runs a model")
    return float(words[0]) - begin, int(words[1]) << 10


def is_right(model: Report) -> bool:
    """Whether all sides were measured; times decide nothing."""
    return "failed" not in model and not model["failures"]


def rows(model: Report) -> list[dict[str, Any]]:
    peer = next((row for row in model["rows"] if row["side"] == PEER), None)
    return [
        {
            "side": row["side"],
            "ms": f"{1e3 * row['seconds']:.1f}",
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "of its time": f"{row['seconds'] / peer['seconds']:.2f}" if peer else "",
            "of its memory": f"{row['bytes'] / peer['bytes']:.2f}" if peer else "",
        }
        for row in model["rows"]
    ]


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    lines = [model["title"], format_table(rows(model)), *model["failures"]]
    return "\n".join([*lines, *verdicts(model["rows"])])


def verdicts(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was wanted of each of our sides, and whether it is so."""
    by_side = {row["side"]: row for row in measured}
    if PEER not in by_side:
        return []
    peer = by_side[PEER]
    found = []
    for side, most in WANTED.items():
        row = by_side[side]
        reached = row["seconds"] <= most * peer["seconds"] and row["bytes"] <= peer["bytes"]
        words = "reached" if reached else "NOT REACHED"
        found.append(f"{side}: wanted at most {most:g} of ONNX Runtime's time and 1 of its memory: {words}")
    return found


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
