"""Compile a model for a target into one artifact, after checking that it computes what the model computes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.tools import interrupt
from graphopt.tools.model_argument import ARTIFACT, add_model_argument, load_model
from graphopt.tools.optimize import print_passes
from graphopt.tools.output_file import check_suffix
from graphopt.tools.pass_options import add_pass_choice, chosen_recipe, optimize_settings
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_bytes, wants_text, write_json
from graphopt.tools.tuning.options import Tuning, add_tuning_options

EXAMPLE = "x86-64-v3,x86-64-v4,sapphirerapids"
SUMMARY = "compile a model into one artifact to ship"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    help = f"a {ARTIFACT} file, or a folder when it ends in {ARTIFACT}/"
    parser.add_argument("-o", "--output", metavar="MODEL.gopt", required=True, help=help)
    parser.add_argument("--target", help="see `graphopt list-targets` (default cpu)")
    help = "targets with commas between them, for one artifact that runs as the best its machine can: " + EXAMPLE
    parser.add_argument("--variants", metavar="A,B,...", help=help)
    parser.add_argument("--threads", type=int, help="threads to cut work for (default: one for each CPU)")
    help = "compare every operator on 8-bit codes alone, too; takes a second compilation"
    parser.add_argument("--check-operators", action="store_true", help=help)
    add_pass_choice(parser)
    add_tuning_options(parser, "your own, see graphopt tune")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    check_suffix(arguments.output, (ARTIFACT, ARTIFACT + "/"))
    import graphopt

    begin = time.monotonic()
    recipe = chosen_recipe(arguments)
    settings = {"target": "cpu"} | optimize_settings(recipe)
    target = variants(arguments) or settings["target"]
    with progress(f"capturing {arguments.model}"):
        program = load_model(arguments)
    with progress("optimizing"):
        result = graphopt.optimize(program, [step.item for step in recipe.passes], **settings)
    with progress(f"compiling for {target}"):
        tuning = Tuning(arguments.tune, arguments.database)
        options = {"threads": arguments.threads, "check_operators": arguments.check_operators, **tuning.options()}
        artifact = graphopt.compile(result.program, target, **options)
        interrupt.check()
        artifact.save(arguments.output)
    report = {**result.report.to_json(), "artifact": summarize(artifact, arguments.output)}
    report["seconds"] = round(time.monotonic() - begin, 2)
    write_json(arguments, report)
    if wants_text(arguments):
        print_passes(report)
        print_artifact(report["artifact"])
        print(f"wrote {arguments.output} in {report['seconds']:.1f} s")
    return 0


def variants(arguments: argparse.Namespace) -> str | None:
    """The targets of --variants with their family, which is cpu where none is written."""
    if arguments.variants is None:
        return None
    if arguments.target is not None:
        raise UsageError("give either --target or --variants")
    from graphopt import list_targets

    known = list_targets()
    names = [name.strip() for name in arguments.variants.split(",")]
    return ",".join(name if name in known or ":" in name else f"cpu:{name}" for name in names)


def summarize(artifact: Any, path: str) -> dict[str, Any]:
    report = artifact.report
    reasons = {name: artifact.manifest.variants[0].kernels[name] for name in report["slow"]}
    each = report.get("variants", {report["target"]: report})
    return {
        "path": path,
        "bytes": size_on_disk(path),
        "target": report["target"],
        "checked_on": report["checked_on"],
        **({"variants": sorted(each)} if "variants" in report else {}),
        "unrun": {target: found["checked_on"] for target, found in each.items() if found["checked_on"] != target},
        **({"operators": dict(report["operators"])} if "operators" in report else {}),
        "kernels": dict(report["kernels"]),
        "tuned": list(report["tuned"]),
        "notes": list(dict.fromkeys(note for found in each.values() for note in found["notes"])),
        "slow": [
            {
                "kernel": name,
                "reason": kernel.slow,
                "nodes": [node for nodes in kernel.nodes.values() for node in nodes],
            }
            for name, kernel in reasons.items()
        ],
    }


def size_on_disk(path: str | Path) -> int:
    path = Path(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def print_artifact(artifact: dict[str, Any]) -> None:
    tuned = f"{len(artifact['tuned'])} tuned, " if artifact["tuned"] else ""
    print(f"kernels  {len(artifact['kernels'])}, {tuned}{len(artifact['slow'])} slow whatever is measured")
    for item in artifact["slow"]:
        print(f"  slow: {item['kernel']} ({item['reason']}), for {', '.join(item['nodes']) or 'no node'}")
    for note in artifact["notes"]:
        print(f"  note: {note}")
    if artifact.get("operators") == {}:
        print("check  no operator is on codes: there is nothing to compare alone")
    for entry, found in artifact.get("operators", {}).items():
        compared = (
            f"{found['operators']} operators on codes are right alone, {found['flipped']} of {found['codes']} codes"
        )
        print(f"check  {entry}: {compared} on the other side of a half")
        for reason in found["left_out"]:
            print(f"  left out: {reason}")
    if "variants" in artifact:
        print(f"variants  {', '.join(artifact['variants'])}; kernels are those of {artifact['target']}")
    print(f"size  {format_bytes(artifact['bytes'])}")
    for target, where in artifact["unrun"].items():
        of = f"{target} " if "variants" in artifact else ""
        command = f"graphopt run {Path(artifact['path']).name} --check"
        print(f"note  {of}checked on {where}; on the target run: {command}")


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
