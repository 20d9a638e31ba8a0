"""Show a model or an artifact: its inputs, outputs, sizes and state, what it is made of, and how large it is."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from graphopt.errors import CaptureError, UsageError
from graphopt.tools.inspect_blocks import describe_blocks, format_blocks
from graphopt.tools.inspect_onnx import describe_file, format_file, format_problems, with_problems
from graphopt.tools.model_argument import HELP_ARTIFACT, add_model_argument, check_model, is_artifact, load_model
from graphopt.tools.progress import progress
from graphopt.tools.table import add_json_option, format_bytes, format_shape, format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.program import Domain, Program, TensorSpec

_SHOWN = 8  # elements of a bound value

SUMMARY = "show what a model or artifact takes, gives and is made of"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, HELP_ARTIFACT)
    help = "also the cut points of a model, its repeated blocks, and what each of them costs"
    parser.add_argument("--blocks", action="store_true", help=help)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if is_artifact(arguments.model):
        if arguments.blocks:
            raise UsageError(f"{arguments.model} is compiled already; give --blocks the model it was made from")
        from graphopt.tools.inspect_artifact import inspect_artifact

        return inspect_artifact(arguments)
    check_model(arguments.model)
    file = describe_file(arguments.model) if arguments.model.endswith(".onnx") else None
    try:
        with progress(f"capturing {arguments.model}"):
            program = load_model(arguments)
    except CaptureError as error:
        if file is not None:
            file = with_problems(file, arguments.model)
            write_json(arguments, {"file": file, "error": str(error)})
            if wants_text(arguments):
                print(f"{format_file(file)}\n\n{format_problems(file)}")
        raise
    report = describe(program, arguments.blocks) | ({"file": file} if file else {})
    write_json(arguments, report)
    if wants_text(arguments):
        if file is not None:
            print(f"{format_file(file)}\n")
        print_report(report)
    return 0


def describe(program: Program, blocks: bool = False) -> dict[str, Any]:
    """JSON-able; parameters are counted once per storage, and costs are at the sizes of the examples."""
    from graphopt.analysis.cost import node_costs, total_cost
    from graphopt.analysis.storage import stored_weights
    from graphopt.matcher import operator_name

    operators = Counter(operator_name(node.target) for node in program.nodes() if node.op.startswith("call_"))
    parameters = stored_weights(program)
    costs = node_costs(program)
    example = program.bind(program.examples)
    return {
        "name": program.name,
        "inputs": [{**describe_spec(spec), **_bound(program, spec.name)} for spec in program.inputs],
        "outputs": [describe_spec(spec) for spec in program.outputs],
        "state": [describe_spec(item.spec) for item in program.state],
        "sizes": {name: {"low": bounds.low, "high": bounds.high} for name, bounds in program.sizes.items()},
        "notes": list(program.notes),
        "nodes": program.count_operators(),
        "operators": dict(operators.most_common()),
        "parameters": sum(item.elements for item in parameters),
        "parameter_tensors": len(parameters),
        "parameter_bytes": sum(item.bytes for item in parameters),
        "macs": total_cost(costs.values()).macs,
        "macs_at": {name: example[name] for name in program.sizes},
        **(describe_blocks(program, costs) if blocks else {}),
    }


def describe_spec(spec: TensorSpec) -> dict[str, Any]:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "dtype": dtype, "shape": list(spec.shape), "domain": describe_domain(spec.domain)}


def describe_domain(domain: Domain) -> str:
    return f"ids {domain.low}..{domain.high}" if domain.kind == "ids" else domain.kind


def _bound(program: Program, name: str) -> dict[str, Any]:
    return {"bound": program.bound[name].reshape(-1).tolist()} if name in program.bound else {}


def print_report(report: dict[str, Any]) -> None:
    print_interface(report)
    rows = [{"operator": name, "nodes": count} for name, count in report["operators"].items()]
    print(f"operators ({report['nodes']} nodes)\n{indent(format_table(rows))}\n")
    size = format_bytes(report["parameter_bytes"])
    print(f"parameters  {report['parameters']:,} in {report['parameter_tensors']} tensors, {size}")
    sizes = ", ".join(f"{name}={size}" for name, size in report["macs_at"].items())
    print(f"MACs        {report['macs']:,}{f' at {sizes}' if sizes else ''}")
    if report["notes"]:
        print("\nnotes\n" + indent("\n".join(report["notes"])))
    if "repeats" in report:
        print(f"\n{format_blocks(report)}")


def print_interface(report: dict[str, Any]) -> None:
    for kind in ("inputs", "outputs", "state"):
        if report[kind]:
            has_bound = any(spec.get("bound") is not None for spec in report[kind])
            rows = [_row(spec, has_bound) for spec in report[kind]]
            print(f"{kind}\n{indent(format_table(rows))}\n")
    if report["sizes"]:
        print(f"sizes\n{indent(format_table([{'name': n, **bounds} for n, bounds in report['sizes'].items()]))}\n")


def _row(spec: dict[str, Any], has_bound: bool) -> dict[str, Any]:
    row = {**spec, "shape": format_shape(spec["shape"])}
    bound = row.pop("bound", None)
    shown = ", ".join(map(str, (bound or [])[:_SHOWN])) + (", ..." if len(bound or ()) > _SHOWN else "")
    return {**row, "bound to": shown} if has_bound else row


def indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
