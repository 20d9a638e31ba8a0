"""What `graphopt inspect` says about an artifact: its manifest, for any target and without running code."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from graphopt.tools.inspect_model import indent, print_interface
from graphopt.tools.table import format_bytes, format_table, wants_text, write_json


def inspect_artifact(arguments: argparse.Namespace) -> int:
    from graphopt.runtime.archive import open_archive
    from graphopt.runtime.manifest import MANIFEST, parse

    manifest = parse(bytes(open_archive(arguments.model.rstrip("/")).member(MANIFEST)))
    report = asdict(manifest)
    write_json(arguments, report)
    if wants_text(arguments):
        print_report(report)
    return 0


def print_report(report: dict[str, Any]) -> None:
    for name, entry in report["entries"].items():
        if len(report["entries"]) > 1:
            print(f"entry {name}\n")
        print_interface(entry)
    for variant in report["variants"]:
        rules = Counter(kernel["rule"] for kernel in variant["kernels"].values())
        kernels = ", ".join(f"{count} {rule}" for rule, count in rules.most_common()) or "none"
        print(f"target    {variant['target']}, needs {' '.join(variant['features']) or 'no CPU features'}")
        print(f"kernels   {len(variant['kernels'])}: {kernels}")
    print(f"made by   {', '.join(f'{name} {version}' for name, version in report['tools'].items())}")
    rows = [{"member": name, "size": format_bytes(item["bytes"])} for name, item in report["files"].items()]
    print(f"\nmembers\n{indent(format_table(rows))}")
