"""Show a model or an artifact: its inputs, outputs, sizes and state, what it is made of, and how large it is."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from graphopt.tools.model_argument import HELP_ARTIFACT, add_model_argument, is_artifact, load_model
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_bytes, format_shape, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.program import Program, TensorSpec

SUMMARY = "show what a model or artifact takes, gives and is made of"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, HELP_ARTIFACT)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if is_artifact(arguments.model):
        from graphopt.tools.inspect_artifact import inspect_artifact

        return inspect_artifact(arguments)
    with progress(f"capturing {arguments.model}"):
        program = load_model(arguments)
    report = describe(program)
    write_json(arguments, report)
    if wants_text(arguments):
        print_report(report)
    return 0


def describe(program: Program) -> dict[str, Any]:
    """JSON-able; parameters are counted once per storage."""
    operators = Counter(str(node.target) for node in program.nodes() if node.op.startswith("call_"))
    parameters = stored_tensors(program)
    return {
        "name": program.name,
        "inputs": [describe_spec(spec) for spec in program.inputs],
        "outputs": [describe_spec(spec) for spec in program.outputs],
        "state": [describe_spec(item.spec) for item in program.state],
        "sizes": {name: {"low": bounds.low, "high": bounds.high} for name, bounds in program.sizes.items()},
        "nodes": program.count_operators(),
        "operators": dict(operators.most_common()),
        "parameters": sum(tensor.numel() for tensor in parameters),
        "parameter_tensors": len(parameters),
        "parameter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in parameters),
    }


def describe_spec(spec: TensorSpec) -> dict[str, Any]:
    domain = f"ids {spec.domain.low}..{spec.domain.high}" if spec.domain.kind == "ids" else spec.domain.kind
    shape = list(spec.shape)
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": shape, "domain": domain}


def stored_tensors(program: Program) -> list[Any]:
    """Parameters and constants that some node reads, one for each storage."""
    from graphopt.program import get_attribute

    tensors = {}
    for _, module in program.graphs():
        for node in module.graph.find_nodes(op="get_attr"):
            value = get_attribute(module, str(node.target))
            if hasattr(value, "untyped_storage"):
                tensors[value.untyped_storage().data_ptr()] = value
    return list(tensors.values())


def print_report(report: dict[str, Any]) -> None:
    print_interface(report)
    rows = [{"operator": name, "nodes": count} for name, count in report["operators"].items()]
    print(f"operators ({report['nodes']} nodes)\n{indent(format_table(rows))}\n")
    size = format_bytes(report["parameter_bytes"])
    print(f"parameters  {report['parameters']:,} in {report['parameter_tensors']} tensors, {size}")


def print_interface(report: dict[str, Any]) -> None:
    for kind in ("inputs", "outputs", "state"):
        if report[kind]:
            rows = [{**spec, "shape": format_shape(spec["shape"])} for spec in report[kind]]
            print(f"{kind}\n{indent(format_table(rows))}\n")
    if report["sizes"]:
        print(f"sizes\n{indent(format_table([{'name': n, **bounds} for n, bounds in report['sizes'].items()]))}\n")


def indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
