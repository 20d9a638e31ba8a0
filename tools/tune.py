"""Measure configurations of a model's kernels and keep the best, or manage the store that keeps them."""

from __future__ import annotations

import argparse

from graphopt.tools.table import add_json_option
from graphopt.tools.tuning import search_command, store_commands

SUMMARY = "measure faster kernels for a model, and manage the store that keeps them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    search_command.add_arguments(parser)
    store_commands.add_arguments(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        search_command.check(arguments)
        return store_commands.run(arguments)
    store_commands.check_unused(arguments)
    return search_command.run(arguments)


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
