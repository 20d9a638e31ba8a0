"""Write the folder to ship: an artifact with all that runs it, under Python with numpy alone or in a C++ program."""

from __future__ import annotations

import argparse
import os

from graphopt.errors import UsageError
from graphopt.tools.compile import size_on_disk
from graphopt.tools.model_argument import check_artifact
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_bytes, wants_text, write_json

SUMMARY = "write the folder to ship: an artifact and what runs it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a .gopt file or folder")
    parser.add_argument("--python", metavar="DIR", help="a folder that runs it where Python and numpy are installed")
    parser.add_argument("--cpp", metavar="DIR", help="a project for CMake or c++ that runs it, with an example")
    help = "a folder of wheels of apache-tvm and apache-tvm-ffi for another machine (default: those installed here)"
    parser.add_argument("--wheels", metavar="DIR", help=help)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt.package.cpp_project import write_cpp_project
    from graphopt.package.python_folder import write_python_folder

    writers = {"python": write_python_folder, "cpp": write_cpp_project}
    wanted = {kind: folder for kind in writers if (folder := getattr(arguments, kind))}
    if not wanted:
        raise UsageError("say what to write: --python DIR or --cpp DIR")
    if len({os.path.realpath(folder) for folder in wanted.values()}) < len(wanted):
        raise UsageError(f"--python and --cpp are both {arguments.cpp}; give each a folder of its own")
    check_artifact(arguments.artifact)
    if arguments.wheels is not None and not os.path.isdir(arguments.wheels):
        raise UsageError(f"--wheels {arguments.wheels} is no folder; give the one that pip download wrote")
    rows = []
    for kind, folder in wanted.items():
        with progress(f"packaging for {kind}"):
            writers[kind](arguments.artifact, folder, arguments.wheels)
        rows.append({"kind": kind, "path": folder, "bytes": size_on_disk(folder)})
    write_json(arguments, rows)
    if wants_text(arguments):
        for row in rows:
            print(f"wrote {row['path']}, {format_bytes(row['bytes'])}")
    return 0


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
