"""--html: both graphs side by side in one file for a browser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.model_argument import is_artifact
from graphopt.tools.output_file import check_suffix, replace_file

if TYPE_CHECKING:
    from graphopt.program import Program

SUFFIX = ".html"


def add_html_option(parser: argparse.ArgumentParser) -> None:
    help = "write a page that shows both graphs side by side, what changed and why; it needs nothing but a browser"
    parser.add_argument("--html", metavar=f"PAGE{SUFFIX}", help=help)


def add_page_sources(parser: argparse.ArgumentParser) -> None:
    """What a page about two models says more with."""
    help = "what `graphopt optimize A -o B --json FILE` wrote: the why and the error of each rewrite for --html"
    parser.add_argument("--report", metavar="FILE", help=help)
    help = "what `graphopt profile --json FILE` wrote of B compiled: the time of each node for --html"
    parser.add_argument("--profile", metavar="FILE", help=help)


def check_html(arguments: argparse.Namespace, *models: str) -> None:
    """Before the work: raises UsageError where no page can be made of `models` with these options."""
    if arguments.html is None:
        for option in ("report", "profile"):
            if getattr(arguments, option, None) is not None:
                raise UsageError(f"--{option} is for the page of --html; add --html page{SUFFIX}")
        return
    check_suffix(arguments.html, (SUFFIX,))
    for model in models:
        if is_artifact(model):
            raise UsageError(f"{model} is compiled, and --html shows graphs; give it the model that it was made from")


def read_json(path: str | None) -> Mapping[str, Any] | None:
    """The object in a JSON file, None without one. Raises UsageError for anything else."""
    if path is None:
        return None
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is no JSON ({e}); give a file that --json wrote") from e
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object; give a file that --json wrote")
    return value


def write_page(
    path: str | None,
    a: Program | None,
    b: Program | None,
    *,
    report: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    outputs: Sequence[Mapping[str, Any]] = (),
    titles: tuple[str, str] | None = None,
) -> None:
    """Do what --html asks for; without it nothing."""
    if path is None or a is None or b is None:
        return
    from graphopt.diff_page import diff_page

    page = diff_page(a, b, report=report, profile=profile, outputs=outputs, titles=titles)
    with replace_file(path) as stream:
        stream.write(page.encode())
