"""List the targets that models can be compiled for, and what this machine lacks to build for, run and tune each."""

from __future__ import annotations

import argparse
from typing import Any

from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

SUMMARY = "list the targets, and what is missing here for each"
COLUMNS = ("target", "what", "compiled as", "cuda", "GB", "watts", "build", "run", "tune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="only this one")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from graphopt import list_targets
    from graphopt.registry import check_target

    names = list_targets()
    if arguments.target is not None:
        check_target(arguments.target)
        names = (arguments.target,)
    rows = [describe(name) for name in names]
    write_json(arguments, rows)
    if wants_text(arguments):
        print(format_table(rows, COLUMNS))
        print("build, run, tune: what is missing for it here; yes where nothing is")
    return 0


def describe(name: str) -> dict[str, Any]:
    """A row: strings, but for `GB`; `features` are what its CPU needs."""
    from graphopt.backends.cuda.target import target_names as cuda_names
    from graphopt.backends.target import LEVELS, resolve_target
    from graphopt.backends.targets import DEVICES, Device, ability

    device = DEVICES.get(name, Device(name, "the best of this machine" if name == "cpu" else "", name))
    row: dict[str, Any] = {
        "target": name,
        "what": device.summary,
        "cuda": device.cuda,
        "GB": device.memory,
        "watts": "/".join(device.power_modes),
    }
    if name in cuda_names() or "+" in name:  # of several architectures
        return row | _describe_gpu(name)
    if name not in ("cpu", *LEVELS, *DEVICES):
        return row | {"what": "of another package"}
    features = resolve_target(name).features
    found = ability(features)
    return row | {
        "compiled as": device.level,
        "features": list(features),
        "build": found.build or "yes",
        "run": found.run or "yes",
        "tune": found.tune or "yes",
        **({"note": f"on its CPU: {device.cpu_only}"} if device.cpu_only else {}),
    }


def _describe_gpu(name: str) -> dict[str, Any]:
    from graphopt.backends.cuda.compiler import find_compiler
    from graphopt.backends.cuda.target import resolve_target
    from graphopt.backends.targets import missing_builder
    from graphopt.errors import CompileError
    from graphopt.runtime.features import missing

    target = resolve_target(name)
    build = missing_builder(target.machine)
    if not build:
        try:
            find_compiler(target.archs)
        except CompileError as e:
            build = str(e)
    return {
        "cuda": "+".join(target.archs),
        "features": list(target.features),
        "build": build or "yes",
        "run": "a machine with this GPU" if missing(target.features) else "yes",
        "tune": "kernels for GPUs are not tuned",
    }


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
