"""Run ONNX's own tests and say which pass, which are refused and why.

Each test runs in a process of limited memory and time. Ctrl-C loses nothing with -o: --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

SUMMARY = "run ONNX's own tests"
MODES = ("eager", "compiled", "roundtrip")
SUITES = ("node", "simple", "light", "pytorch-converted", "pytorch-operator")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, default="eager", help="how the models run (default eager)")
    parser.add_argument(
        "--suite", choices=SUITES, action="append", help="which of ONNX's tests, several times (default node)"
    )
    parser.add_argument("--only", metavar="PATTERN", action="append", help="tests of these names: 'test_conv*'")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each CPU")
    parser.add_argument("--seconds", type=float, default=120, help="most that one test may take (default 120)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write one line of JSON for each test as it ends")
    parser.add_argument("--resume", action="store_true", help="keep what is in FILE and run the other tests")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt.tools.conforming.cases import load_cases

    if arguments.processes < 1 or not arguments.seconds > 0:
        raise UsageError("--processes and --seconds must be above 0")
    if arguments.resume and arguments.output is None:
        raise UsageError("--resume needs -o FILE, the results to go on from")
    cases = load_cases(arguments.suite or ["node"], arguments.only or [])
    if not cases:
        raise UsageError(f"no test is called {' or '.join(arguments.only)}; patterns are those of file names")
    records = _run(cases, arguments)
    write_json(arguments, records)
    if wants_text(arguments):
        print(_format(records))
    return int(any(record["outcome"] in ("wrong", "failed", "crashed") for record in records))


def _run(cases: list[Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from graphopt.tools.conforming.cases import describe
    from graphopt.tools.conforming.pool import run_all

    done = _read(arguments.output) if arguments.resume else {}
    known = {case.name: case for case in cases}
    records = {name: done[arguments.mode, name] for name in known if (arguments.mode, name) in done}
    left = [case for case in cases if case.name not in records]
    begin = time.monotonic()
    with open(arguments.output or os.devnull, "a" if arguments.resume else "w") as file:
        for number, record in run_all(left, arguments.mode, arguments.processes, arguments.seconds):
            case = left[number]
            records[case.name] = {**describe(case, known), "mode": arguments.mode, **record}
            file.write(json.dumps(records[case.name]) + "\n")
            file.flush()
            _show(records, len(cases), time.monotonic() - begin)
    return [records[case.name] for case in cases]


def _read(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Results by mode and test; a line that was cut off is not one."""
    done = {}
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            done[record["mode"], record["test"]] = record
    return done


def _show(records: dict[str, dict[str, Any]], total: int, seconds: float) -> None:
    if sys.stderr.isatty():
        counts = Counter(record["outcome"] for record in records.values())
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        end = "\n" if len(records) == total else ""
        sys.stderr.write(f"\r\033[K{len(records)} of {total} tests in {seconds:.0f} s: {said}{end}")
        sys.stderr.flush()


def _format(records: list[dict[str, Any]]) -> str:
    """Those that did not pass, then the totals."""
    rows = [
        {"test": record["test"], "outcome": record["outcome"], "reason": record["reason"]}
        for record in records
        if record["outcome"] not in ("passed", "not-applicable")
    ]
    counts = Counter(record["outcome"] for record in records)
    counts["of these bound"] = sum("bound" in record for record in records)
    totals = [{"outcome": outcome, "tests": count} for outcome, count in counts.most_common() if count]
    return f"{format_table(rows)}\n\n{format_table(totals)}" if rows else format_table(totals)


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
