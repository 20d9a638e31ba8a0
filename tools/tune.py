"""Manage the store of tuned configurations: list it, share it, merge others into it, drop what is not needed."""

from __future__ import annotations

import argparse

from graphopt.tools.table import add_json_option
from graphopt.tools.tuning import store_commands

SUMMARY = "manage the store of tuned configurations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    store_commands.add_arguments(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    return store_commands.run(arguments)


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
