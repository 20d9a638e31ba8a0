"""Say why passes changed a model, or left it alone: what was rewritten, declined, nearly matched, wrong or slower."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.model_argument import check_artifact, is_artifact
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json, write_schema

if TYPE_CHECKING:
    from graphopt.explain import Answer

SUMMARY = "say why passes changed a node, or left it alone"
SHOWN = 10  # kinds of reasons a pass; --json and --pass have all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a file that `graphopt optimize --json FILE` wrote, or a .gopt artifact"
    parser.add_argument("report", metavar="REPORT", nargs="?", help=help)
    parser.add_argument("--pass", dest="pass_name", metavar="P", help="one pass only, with all kinds of reasons")
    parser.add_argument("--node", metavar="N", help="one node, followed from pass to pass")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of reports")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return show_schema(arguments)
    if arguments.report is None:
        raise UsageError("REPORT is missing (only --schema does without); see graphopt explain --help")
    from dataclasses import asdict

    from graphopt.explain import explain

    answers = explain(read_report(arguments.report), arguments.node, arguments.pass_name)
    write_json(arguments, [asdict(answer) for answer in answers])
    if wants_text(arguments):
        print(format_node(answers) if arguments.node is not None else format_passes(answers, arguments.pass_name))
    return 0


def show_schema(arguments: argparse.Namespace) -> int:
    from importlib import resources

    for name, value in (("REPORT", arguments.report), ("--node", arguments.node), ("--pass", arguments.pass_name)):
        if value is not None:
            raise UsageError(f"{name} has no effect with --schema; leave one of them out")
    write_schema(arguments, json.loads((resources.files("graphopt") / "report.schema.json").read_bytes()))
    return 0


def read_report(path: str) -> Any:
    check_artifact(path)
    if is_artifact(path):
        from graphopt.runtime.archive import open_archive
        from graphopt.runtime.manifest import REPORT

        return json.loads(bytes(open_archive(path.rstrip("/")).member(REPORT)))
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        return json.loads(content)
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is no text; give what `graphopt optimize --json FILE` wrote") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is no JSON ({e}); give what `graphopt optimize --json FILE` wrote") from e


def format_node(answers: list[Answer]) -> str:
    return format_table(
        [{**place(answer), "outcome": answer.outcome, "why": answer.sentence} for answer in answers],
        columns_of(answers, "outcome", "why"),
    )


def format_passes(answers: list[Answer], pass_name: str | None) -> str:
    """How often each pass did what, then the reasons, alike ones counted together with one of their nodes."""
    from graphopt.explain import OUTCOMES, group

    if not answers:
        return "nothing was rewritten, and no rule came near"
    counts: dict[tuple[str, int], dict[str, Any]] = {}
    for answer in answers:
        row = counts.setdefault((answer.entry, answer.position), {**place(answer), **dict.fromkeys(OUTCOMES, 0)})
        row[answer.outcome] += 1
    rows, left_out, seen = [], 0, dict.fromkeys(counts, 0)
    for item in group(answers):
        answer = item.example
        seen[answer.entry, answer.position] += 1
        if pass_name is None and seen[answer.entry, answer.position] > SHOWN:
            left_out += 1
            continue
        columns = {"times": item.count, "outcome": answer.outcome, "node": answer.node, "why": answer.sentence}
        rows.append({**place(answer), **columns})
    more = f"\n{left_out} more kinds of reasons: --pass P or --json" if left_out else ""
    tables = format_table(list(counts.values())), format_table(rows, columns_of(answers, *columns))
    return "\n\n".join(tables) + more


def place(answer: Answer) -> dict[str, Any]:
    entry = {"entry": answer.entry} if answer.entry not in ("", "main") else {}
    return {**entry, "pass": answer.pass_name}


def columns_of(answers: list[Answer], *columns: str) -> list[str]:
    first = {key: None for answer in answers for key in place(answer)}
    return [*sorted(first), *columns]


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
