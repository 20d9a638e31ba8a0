"""Seeds run in a child process, so that a crash of native code is an outcome like any other and names its seed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.fuzz.check import Outcome

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds for one seed on a busy machine


def run_seeds(name: str, first: int, end: int) -> list[Outcome]:
    """The outcome of every seed from `first` up to, not including, `end`; a child that dies is started again."""
    outcomes: list[Outcome] = []
    while first < end:
        found, started, why = _run(name, first, end)
        outcomes += found
        if started is not None:
            outcomes.append(Outcome(name, started, "crash", "native", why))
        elif not found:
            raise RuntimeError(f"the fuzzing process ended before it ran a seed: {why}")
        first = outcomes[-1].seed + 1
    return outcomes


def _run(name: str, first: int, end: int) -> tuple[list[Outcome], int | None, str]:
    """What one child found, the seed it died on if it did, and how."""
    command = [sys.executable, "-m", "tests.fuzz", name, str(first), str(end)]
    limit = LIMIT + 20 * (end - first)
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        output, errors, code = child.stdout, child.stderr, child.returncode
    except subprocess.TimeoutExpired as error:
        output, errors, code = _text(error.stdout), _text(error.stderr), -signal.SIGALRM
    outcomes, started = [], None
    for line in output.splitlines():
        item = json.loads(line)
        if "kind" in item:
            outcomes.append(Outcome(**item))
            started = None
        else:
            started = item["seed"]
    why = f"the process ended with {code}: {' | '.join(errors.strip().splitlines()[-3:])}"
    return outcomes, started, why


def _text(stream: bytes | str | None) -> str:
    return stream.decode() if isinstance(stream, bytes) else stream or ""


def describe(outcomes: Iterable[Outcome]) -> str:
    """Every failure, each with the command that runs it again."""
    lines = [
        f"{item.name} {item.seed}: {item.kind} in {item.stage}: {item.detail}\n"
        f"    {Path(sys.executable).name} -m tests.fuzz {item.name} {item.seed} --show"
        for item in outcomes
        if item.kind in ("mismatch", "crash")
    ]
    return "\n".join(lines)


def table(outcomes: list[Outcome]) -> str:
    """How many seeds ended how, how many rewrites each pass made, and the time it took."""
    kinds = Counter(item.kind for item in outcomes)
    rewrites: Counter[str] = Counter()
    for item in outcomes:
        rewrites.update(item.rewrites)
    seconds = sum(item.seconds for item in outcomes)
    return f"{len(outcomes)} seeds: {dict(kinds)}, {seconds:.0f} s of CPU time, rewrites: {dict(rewrites)}"
