"""Run one pass over a model, for whoever is writing or judging that pass."""

from __future__ import annotations

import argparse

from graphopt.errors import UsageError
from graphopt.tools.html_page import add_html_option
from graphopt.tools.model_argument import add_model_argument
from graphopt.tools.optimize import add_output_option, optimize_and_write
from graphopt.tools.pass_options import (
    add_checking_options,
    add_data_options,
    spelled_recipe,
)
from graphopt.tools.table import add_json_option

SUMMARY = "run one pass over a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a pass of `graphopt list-passes`")
    add_model_argument(parser)
    add_output_option(parser)
    help = "an option of the pass; values are JSON, bare words are strings"
    parser.add_argument("--option", metavar="K=V", nargs="+", action="extend", default=[], help=help)
    add_checking_options(parser)
    add_data_options(parser)
    add_html_option(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    spec = spell(arguments.name, arguments.option)
    return optimize_and_write(arguments, spelled_recipe(spec, "NAME", arguments), spec)


def spell(name: str, options: list[str]) -> str:
    """("lut-matmul", ["group_size=64"]) -> "lut-matmul{group-size=64}\""""
    words = []
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise UsageError(f"--option {option!r} is not K=V; write for example --option bits=4")
        words.append(f"{key.replace('_', '-')}={value}")
    return f"{name}{{{','.join(words)}}}" if words else name


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
