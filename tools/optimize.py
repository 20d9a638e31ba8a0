"""Run passes over a model, each rewrite checked, and write the optimized model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools import interrupt
from graphopt.tools.html_page import add_html_option, check_html, write_page
from graphopt.tools.model_argument import HELP, add_capture_options, load_model
from graphopt.tools.output_file import check_suffix
from graphopt.tools.pass_options import (
    add_checking_options,
    add_pass_choice,
    chosen_passes,
    chosen_recipe,
    optimize_settings,
)
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.program import Program
    from graphopt.recipes.recipe import Recipe

SUMMARY = "run passes over a model and write the result"
OUTPUTS = (".pt2", ".onnx")
REASONS = 3  # kinds of reasons in the summary
SHOWN = 3  # operators of a region


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=HELP)
    add_capture_options(parser)
    add_output_option(parser, required=False)
    add_pass_choice(parser)
    add_checking_options(parser)
    help = "print the passes, options and settings and where each comes from; MODEL is not read and nothing is written"
    parser.add_argument("--dry-run", action="store_true", help=help)
    help = "also print how often each operator stands in the model before and after"
    parser.add_argument("--verbose", action="store_true", help=help)
    add_html_option(parser)
    add_json_option(parser)


def add_output_option(parser: argparse.ArgumentParser, required: bool = True) -> None:
    help = "a .pt2 or .onnx file; the suffix decides"
    parser.add_argument("-o", "--output", metavar="OUT", required=required, help=help)


def run(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return show_recipe(arguments, chosen_recipe(arguments))
    for name, value in (("MODEL", arguments.model), ("-o OUT", arguments.output)):
        if value is None:
            raise UsageError(f"{name} is missing (only --dry-run does without); see graphopt optimize --help")
    check_suffix(arguments.output, OUTPUTS)
    return optimize_and_write(arguments, chosen_recipe(arguments), chosen_passes(arguments))


def optimize_and_write(arguments: argparse.Namespace, recipe: Recipe, title: str) -> int:
    check_suffix(arguments.output, OUTPUTS)
    check_html(arguments)
    from graphopt import optimize

    settings = optimize_settings(recipe)
    with progress(f"capturing {arguments.model}"):
        program = load_model(arguments)
    with progress(f"running {title}"):
        result = optimize(program, [step.item for step in recipe.passes], **settings)
    with progress(f"writing {arguments.output}"):
        write_program(result.program, arguments.output)
    report = result.report.to_json()
    titles = (arguments.model, arguments.output)
    write_page(arguments.html, program, result.program, report=report, titles=titles)
    write_json(arguments, report)
    if wants_text(arguments):
        print_passes(report)
        if getattr(arguments, "verbose", False):
            print_operators(report)
        print(f"wrote {arguments.output}" + (f" and {arguments.html}" if arguments.html is not None else ""))
    return 0


def show_recipe(arguments: argparse.Namespace, recipe: Recipe) -> int:
    """What `optimize` would be called with: explicit settings with where they come from, and its defaults."""
    optimize_settings(recipe)  # what cannot be used is an error here, too
    plan = describe_recipe(recipe)
    write_json(arguments, plan)
    if wants_text(arguments):
        rows = [{**item, "options": spell_options(item["options"])} for item in plan["passes"]]
        print(format_table(rows, ("pass", "options", "from")))
        print()
        print(format_table([{"setting": name, **setting} for name, setting in plan["settings"].items()]))
    return 0


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    import inspect

    from graphopt.optimize import optimize
    from graphopt.recipes.recipe import SETTINGS
    from graphopt.spec_string import pass_options

    parameters = inspect.signature(optimize).parameters
    settings = {}
    for key in (*SETTINGS, "data"):
        name = key.replace("-", "_")
        given = recipe.settings.get(name)
        value, origin = (given.value, given.origin) if given else (parameters[name].default, "default")
        settings[key] = {"value": value, "from": origin}
    steps = [
        {"pass": step.item.name, "options": pass_options(step.item), "from": step.origin} for step in recipe.passes
    ]
    return {"passes": steps, "settings": settings}


def spell_options(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={json.dumps(value)}" for name, value in options.items())


def write_program(program: Program, path: str) -> None:
    interrupt.check()
    if path.endswith(".onnx"):
        program.to_onnx(path)
    else:
        program.save(path)


def print_passes(report: dict[str, Any]) -> None:
    """One line a pass, then what was taken back, and the most frequent reasons for leaving something alone."""
    rows = [
        {
            "pass": item["name"],
            "rewrites": len(item["rewrites"]),
            "declined": len(item["declined"]),
            "taken back": len(item["rolled_back"]) + sum(len(slower["ids"]) for slower in item["slower"]),
            "nodes before": item["nodes_before"],
            "after": item["nodes_after"],
            "seconds": round(item["seconds"], 2),
        }
        for item in report["passes"]
    ]
    if rows:
        print(format_table(rows))
    for item in report["passes"]:
        for note in item["notes"]:
            print(f"{item['name']}: {note}")
        if points := item["trade_offs"]:
            print(f"\n{format_table(trade_off_rows(points, report['metric']))}\n")
        if regions := item["regions"]:
            print(f"\n{format_table(region_rows(regions))}\n")
    print(f"nodes  {report['nodes_before']} -> {report['nodes_after']}")
    for note in report["notes"]:
        print(f"note   {note}")
    if metric := report["metric"]:
        print(f"{metric['name']}  {metric['before']:.6g} -> {metric['after']:.6g} on held-out data")
    if reasons := top_reasons(report):
        print(f"\n{format_table(reasons)}\n(`graphopt explain` tells the rest, from what --json FILE writes)\n")


def trade_off_rows(points: list[dict[str, Any]], metric: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row a setting that a pass measured."""
    name = "metric" if metric is None else metric["name"]
    return [
        {
            item["setting"]: f"{item['value']:g}",
            "": item["variant"],
            name: f"{item['metric']:.6g}",
            "ms": "" if item["seconds"] is None else f"{item['seconds'] * 1e3:.3f}",
        }
        for item in points
    ]


def region_rows(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a region that a pass raced; those that were measured as one are one row."""
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for item in regions:
        groups.setdefault((item["seconds_without"], item["seconds_with"]), []).append(item)
    return [
        {
            "region": _listed(items[0]["nodes"]) or "the whole program",
            "times": len(items),
            "ms without": f"{without * 1e3:.4f}",
            "ms with": f"{with_ * 1e3:.4f}",
            "": "kept" if items[0]["kept"] else "taken back",
        }
        for (without, with_), items in groups.items()
    ]


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def top_reasons(report: dict[str, Any]) -> list[dict[str, Any]]:
    from graphopt.explain import explain, group

    groups = group(answer for answer in explain(report) if answer.outcome not in ("applied", "near miss"))
    declined = sorted((item for item in groups if item.example.outcome == "declined"), key=lambda item: -item.count)
    shown = [*(item for item in groups if item.example.outcome != "declined"), *declined[:REASONS]]
    return [
        {
            "pass": item.example.pass_name,
            "outcome": item.example.outcome,
            "times": item.count,
            "node": item.example.node,
            "why": item.example.sentence,
        }
        for item in shown
    ]


def print_operators(report: dict[str, Any]) -> None:
    """How often each operator stands in the model before and after, where that changed."""
    before, after = report["before"]["operators"], report["after"]["operators"]
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    rows = [{"operator": name, "before": before.get(name, 0), "after": after.get(name, 0)} for name in names]
    print(f"\n{format_table(rows)}\n" if rows else "every operator is there as often as before")


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
