"""Run two models or artifacts on the same inputs and say how far their outputs are apart.

With --html both graphs are shown side by side.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np

from graphopt.errors import UsageError
from graphopt.tools.array_file import read_arrays
from graphopt.tools.html_page import add_html_option, add_page_sources, check_html, read_json, write_page
from graphopt.tools.model_argument import HELP_ARTIFACT, add_capture_options
from graphopt.tools.progress import progress
from graphopt.tools.subject import Array, Arrays, add_entry_option, add_size_options, chosen_sizes, open_subject
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

SUMMARY = "compare the outputs of two models or artifacts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=HELP_ARTIFACT)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--input", metavar="X.npz", help="inputs by name (default: drawn from A)")
    parser.add_argument("--atol", type=float, default=1e-4, help="absolute tolerance (default 1e-4)")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance (default 1e-3)")
    add_entry_option(parser)
    add_capture_options(parser)
    add_size_options(parser)
    add_html_option(parser)
    add_page_sources(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    for option, value in (("--atol", arguments.atol), ("--rtol", arguments.rtol)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{option} {value:g} is no tolerance; give a number of at least 0")
    check_html(arguments, arguments.a, arguments.b)
    report, profile = read_json(arguments.report), read_json(arguments.profile)
    with progress("opening both"):
        a, b = (open_subject(path, arguments, arguments.entry) for path in (arguments.a, arguments.b))
    if arguments.input:
        feed = read_arrays(arguments.input)
    else:
        feed = a.draw(chosen_sizes(arguments, a.inputs), arguments.seed)
    with progress("running both"):
        rows = compare_outputs(a.run(feed), b.run(feed), arguments.atol, arguments.rtol)
    within = all(row["within"] for row in rows)
    titles = (arguments.a, arguments.b)
    write_page(arguments.html, a.program, b.program, report=report, profile=profile, outputs=rows, titles=titles)
    write_json(arguments, {"within": within, "atol": arguments.atol, "rtol": arguments.rtol, "outputs": rows})
    if wants_text(arguments):
        print(format_table(rows))
        if arguments.html is not None:
            print(f"wrote {arguments.html}")
        print("the outputs agree" if within else f"outside atol {arguments.atol:g}, rtol {arguments.rtol:g}")
    return 0 if within else 1


def compare_outputs(a: Arrays, b: Arrays, atol: float, rtol: float) -> list[dict[str, Any]]:
    """One row an output; B is held against A: |b - a| <= atol + rtol * |a|, NaN equal to NaN."""
    if list(a) != list(b):
        raise UsageError(f"the outputs have different names: {', '.join(a)} and {', '.join(b)}")
    return [{"output": name, **difference(a[name], b[name], atol, rtol)} for name in a]


def difference(a: Array, b: Array, atol: float, rtol: float) -> dict[str, Any]:
    """max_abs, max_rel (both over finite elements), cosine, within; shapes that differ are outside any tolerance."""
    if a.shape != b.shape:
        return {"max_abs": None, "max_rel": None, "cosine": None, "within": False}
    left, right = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    within = bool(np.allclose(right, left, rtol=rtol, atol=atol, equal_nan=True))
    finite = np.isfinite(left) & np.isfinite(right)
    left, right = left[finite], right[finite]
    gap = np.abs(right - left)
    size = np.abs(left)
    relative = gap[size > 0] / size[size > 0]
    return {
        "max_abs": float(gap.max(initial=0.0)),
        "max_rel": float(relative.max(initial=0.0)),
        "cosine": cosine(left, right),
        "within": within,
    }


def cosine(left: Array, right: Array) -> float | None:
    """None where one of them is zero."""
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    return min(1.0, float(left @ right) / norm) if norm else None


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
