"""One way to print a table, and to write the same as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    help = "write JSON to FILE, or without FILE to stdout in place of the table"
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help=help)


def wants_text(arguments: argparse.Namespace) -> bool:
    """Stdout holds text unless it was asked to hold JSON."""
    return bool(arguments.json != "-")


def write_json(arguments: argparse.Namespace, value: Any) -> None:
    """Do what --json asks for; without it nothing."""
    if arguments.json is None:
        return
    text = json.dumps(value, indent=1, default=str) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
        return
    from graphopt.tools.output_file import replace_file

    with replace_file(arguments.json) as stream:
        stream.write(text.encode())


def write_schema(arguments: argparse.Namespace, schema: Mapping[str, Any]) -> None:
    """To stdout, or to the file that --json names."""
    arguments.json = arguments.json or "-"
    write_json(arguments, schema)


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Columns are keys of the rows, numbers to the right; rows may leave cells out."""
    if not rows:
        return "(none)"
    columns = list(rows[0]) if columns is None else columns
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    right = [all(is_number(row.get(column)) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        pairs = zip(values, widths, right, strict=True)
        return "  ".join(v.rjust(width) if number else v.ljust(width) for v, width, number in pairs).rstrip()

    return "\n".join([line(columns), *map(line, cells)])


def is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_shape(shape: Sequence[int | str]) -> str:
    """(1, 128) -> "1x128", ("batch", "seq") -> "batch x seq", () -> "scalar\""""
    return ("x" if all(isinstance(size, int) for size in shape) else " x ").join(map(str, shape)) or "scalar"


def format_bytes(count: int) -> str:
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
