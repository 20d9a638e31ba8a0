"""Run an artifact on inputs from a file, or check it against the sample it carries."""

from __future__ import annotations

import argparse

from graphopt.errors import UsageError
from graphopt.tools.array_file import read_arrays, write_arrays
from graphopt.tools.compare import compare_outputs
from graphopt.tools.model_argument import check_artifact
from graphopt.tools.output_file import check_suffix
from graphopt.tools.subject import add_entry_option, choose_entry
from graphopt.tools.table import add_json_option, format_shape, format_table, wants_text, write_json

SUMMARY = "run an artifact on inputs from a file, or check it"
ATOL, RTOL = 1e-4, 1e-3  # float32 sums in another order, on another CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a .gopt file or folder")
    parser.add_argument("--input", metavar="X.npz", help="arrays by input name")
    parser.add_argument("-o", "--output", metavar="Y.npz", help="where the outputs go, by name")
    parser.add_argument("--check", action="store_true", help="run the sample inside the artifact; exit 1 if it is off")
    add_entry_option(parser)
    parser.add_argument("--threads", type=int, help="(default: one for each CPU)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.check == bool(arguments.input):
        raise UsageError("give either --input x.npz -o y.npz or --check")
    if arguments.check and arguments.output:
        raise UsageError("--check writes nothing; leave -o out or give --input")
    if arguments.input and not arguments.output:
        raise UsageError("say where the outputs go with -o y.npz")
    check_artifact(arguments.artifact)
    return check(arguments) if arguments.check else run_file(arguments)


def check(arguments: argparse.Namespace) -> int:
    from graphopt.runtime.session import InferenceSession

    session = InferenceSession(arguments.artifact, threads=arguments.threads)
    entry = choose_entry(session, arguments.entry)
    feed, expected = session.samples(entry)
    outputs = session.run(list(expected), feed, entry=entry)
    rows = compare_outputs(expected, dict(zip(expected, outputs, strict=True)), ATOL, RTOL)
    good = all(row["within"] for row in rows)
    write_json(arguments, {"good": good, "outputs": rows})
    if wants_text(arguments):
        print(format_table(rows))
        print(
            "the artifact computes what it computed when it was made"
            if good
            else "the artifact computes something else"
        )
    return 0 if good else 1


def run_file(arguments: argparse.Namespace) -> int:
    from graphopt.runtime.session import InferenceSession

    check_suffix(arguments.output, (".npz",))
    feed = read_arrays(arguments.input)
    session = InferenceSession(arguments.artifact, threads=arguments.threads)
    entry = choose_entry(session, arguments.entry)
    names = [item.name for item in session.get_outputs(entry)]
    outputs = dict(zip(names, session.run(names, feed, entry=entry), strict=True))
    write_arrays(arguments.output, outputs)
    rows = [{"output": name, "dtype": str(v.dtype), "shape": format_shape(v.shape)} for name, v in outputs.items()]
    write_json(arguments, rows)
    if wants_text(arguments):
        print(format_table(rows))
        print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
