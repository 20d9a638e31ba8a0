"""Run ONNX's own tests and say which pass, which are refused and why.

Each test runs in a process of limited memory and time. With -o Ctrl-C loses nothing: --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.conforming.names import MODES, SUITES
from graphopt.tools.output_file import replace_file
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.tools.conforming.cases import Case

SUMMARY = "run ONNX's own tests"
Key = tuple[str, str, str]  # suite, test, mode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = "; may be given several times"
    parser.add_argument("--mode", choices=MODES, action="append", help=f"how models run (default eager){several}")
    parser.add_argument("--suite", choices=SUITES, action="append", help=f"which tests (default node){several}")
    parser.add_argument("--only", metavar="PATTERN", action="append", help=f"tests called so: 'test_conv*'{several}")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each CPU")
    parser.add_argument("--seconds", type=float, default=120, help="processor time of one test (default 120)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write one line of JSON for each test as it ends")
    parser.add_argument("--resume", action="store_true", help="keep what is in FILE and run the other tests")
    parser.add_argument("--markdown", metavar="FILE", help="write all of it as a page")
    parser.add_argument("--passing", metavar="FILE", help="write the names of the tests that pass, with their modes")
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
    _write_pages(records, arguments)
    if wants_text(arguments):
        print(_format(records))
    return int(any(record["outcome"] in ("wrong", "failed", "crashed") for record in records))


def _run(cases: Sequence[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from graphopt.tools.conforming.cases import describe
    from graphopt.tools.conforming.pool import run_all

    modes = list(dict.fromkeys(arguments.mode or ["eager"]))
    wanted: list[Key] = [(case.suite, case.name, mode) for mode in modes for case in cases]
    done = _read(arguments.output) if arguments.resume else {}
    records = {key: done[key] for key in wanted if key in done}
    names = {case.name: case for case in cases}
    begin = time.monotonic()
    if done:  # the last line may have been cut off
        with replace_file(arguments.output) as stream:
            stream.writelines(json.dumps(record).encode() + b"\n" for record in done.values())
    with open(arguments.output or os.devnull, "a" if arguments.resume else "w") as file:
        for mode in modes:
            left = [case for case in cases if (case.suite, case.name, mode) not in records]
            for number, record in run_all(left, mode, arguments.processes, arguments.seconds):
                whole = {**describe(left[number], names), "mode": mode, **record}
                records[_key(whole)] = whole
                file.write(json.dumps(whole) + "\n")
                file.flush()
                _show(list(records.values()), len(wanted), time.monotonic() - begin)
    return [records[key] for key in wanted]


def _key(record: dict[str, Any]) -> Key:
    return record["suite"], record["test"], record["mode"]


def _read(path: str) -> dict[Key, dict[str, Any]]:
    """Results that were written before; a line that was cut off is none."""
    done = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        done[_key(record)] = record
    return done


def _write_pages(records: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from graphopt.tools.conforming.coverage_page import coverage_page, passing_list

    for path, write in ((arguments.markdown, coverage_page), (arguments.passing, passing_list)):
        if path is not None:
            with replace_file(path) as stream:
                stream.write(write(records).encode())


def _show(records: Sequence[dict[str, Any]], total: int, seconds: float) -> None:
    if sys.stderr.isatty():
        counts = Counter(record["outcome"] for record in records)
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        end = "\n" if len(records) == total else ""
        sys.stderr.write(f"\r\033[K{len(records)} of {total} in {seconds:.0f} s: {said}{end}")
        sys.stderr.flush()


def _format(records: Sequence[dict[str, Any]]) -> str:
    """Those that did not pass, then the totals."""
    rows = [
        {"test": record["test"], "mode": record["mode"], "outcome": record["outcome"], "reason": record["reason"]}
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
