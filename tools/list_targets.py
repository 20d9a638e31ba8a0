"""List the targets that models can be compiled for."""

from __future__ import annotations

import argparse

from graphopt.tools.table import add_json_option, wants_text, write_json

SUMMARY = "list the targets to compile for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt import list_targets

    names = list(list_targets())
    write_json(arguments, names)
    if wants_text(arguments):
        print("\n".join(names))
    return 0


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
