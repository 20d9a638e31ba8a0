"""Run passes over a model, each rewrite checked, and write the optimized model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from graphopt.tools import interrupt
from graphopt.tools.model_argument import add_model_argument, load_model
from graphopt.tools.output_file import check_suffix
from graphopt.tools.pass_options import add_checking_options, add_pass_choice, checking_options, chosen_passes
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.program import Program

SUMMARY = "run passes over a model and write the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_output_option(parser)
    add_pass_choice(parser)
    add_checking_options(parser)
    add_json_option(parser)


def add_output_option(parser: argparse.ArgumentParser) -> None:
    help = "a .pt2 or .onnx file; the suffix decides"
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help=help)


def run(arguments: argparse.Namespace) -> int:
    return optimize_and_write(arguments, chosen_passes(arguments), checking_options(arguments))


def optimize_and_write(arguments: argparse.Namespace, passes: str, options: dict[str, Any]) -> int:
    check_suffix(arguments.output, (".pt2", ".onnx"))
    from graphopt import optimize

    with progress(f"capturing {arguments.model}"):
        program = load_model(arguments)
    with progress(f"running {passes}"):
        result = optimize(program, passes, **options)
    with progress(f"writing {arguments.output}"):
        write_program(result.program, arguments.output)
    report = result.report.to_json()
    write_json(arguments, report)
    if wants_text(arguments):
        print_passes(report)
        print(f"wrote {arguments.output}")
    return 0


def write_program(program: Program, path: str) -> None:
    interrupt.check()
    if path.endswith(".onnx"):
        program.to_onnx(path)
    else:
        program.save(path)


def print_passes(report: dict[str, Any]) -> None:
    """One line a pass; what did not fire is counted, `--json` has the reasons."""
    rows = [
        {
            "pass": item["name"],
            "rewrites": len(item["rewrites"]),
            "declined": len(item["declined"]),
            "nodes before": item["nodes_before"],
            "after": item["nodes_after"],
            "seconds": round(item["seconds"], 2),
        }
        for item in report["passes"]
    ]
    if rows:
        print(format_table(rows))
    print(f"nodes  {report['nodes_before']} -> {report['nodes_after']}")


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
