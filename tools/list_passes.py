"""List the passes, their options and what they promise."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from graphopt.tools.table import add_json_option, format_table, wants_text, write_json, write_schema

if TYPE_CHECKING:
    from graphopt.registry import OptionInfo, PassInfo

SUMMARY = "list the passes and their options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes with these passes")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        from graphopt.recipes.recipe_schema import recipe_schema

        write_schema(arguments, recipe_schema())
        return 0
    from graphopt import list_passes

    passes = list_passes()
    write_json(arguments, [describe(item) for item in passes])
    if wants_text(arguments):
        print(format_table([row(item) for item in passes]))
    return 0


def describe(item: PassInfo) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item)


def row(item: PassInfo) -> dict[str, Any]:
    options = " ".join(spell_option(option) for option in item.options)
    return {"pass": item.name, "preserves": item.preserves, "options": options, "what it does": item.summary}


def spell_option(option: OptionInfo) -> str:
    return f"{option.name}:{option.type}" if option.required else f"{option.name}={option.default}"


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
