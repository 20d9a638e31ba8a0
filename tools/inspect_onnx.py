"""What an ONNX file says of itself, and all that keeps it from being imported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from graphopt.tools.table import format_bytes, format_shape, format_table


def describe_file(path: str) -> dict[str, Any]:
    """JSON-able; nothing is imported, so that it also serves for files that cannot be. Raises CaptureError."""
    import graphopt.capture.onnx.operators  # noqa: F401  fills the table
    from graphopt.capture.onnx.graphs import DOMAINS, all_nodes, operator_name
    from graphopt.capture.onnx.importer import is_imported
    from graphopt.capture.onnx.reading import read_model
    from graphopt.untrusted.limits import Limits

    model, _ = read_model(path, Limits())
    nodes = list(all_nodes(model.graph))
    opset = max((o.version for o in model.opset_import if o.domain in DOMAINS), default=0)
    unknown = {operator_name(node) for node in nodes if not is_imported(node, opset)}
    counts, used = Counter(map(operator_name, nodes)), {node.domain for node in nodes}
    held = {proto.name for proto in model.graph.initializer}
    return {
        "ir_version": model.ir_version,
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "opsets": {o.domain or "onnx": o.version for o in model.opset_import if o.domain in used},
        "inputs": [_describe_value(value) for value in model.graph.input if value.name not in held],
        "outputs": [_describe_value(value) for value in model.graph.output],
        "operators": [
            {"operator": name, "nodes": count, "imported": name not in unknown} for name, count in counts.most_common()
        ],
        **_describe_tensors(model),
    }


def with_problems(report: dict[str, Any], path: str) -> dict[str, Any]:
    """The report with all that cannot be imported, and the domains of the inputs as far as they show."""
    from graphopt.capture.onnx.reading import read_model
    from graphopt.capture.onnx.survey import survey
    from graphopt.tools.inspect_model import describe_domain
    from graphopt.untrusted.limits import Limits

    found = survey(*read_model(path, Limits()), Limits())
    domains = {name: describe_domain(domain) for name, domain in found.domains.items()}
    return {
        **report,
        "inputs": [{**item, "domain": domains.get(item["name"], "unknown")} for item in report["inputs"]],
        "problems": [{"where": item.where or "the model", "why": item.sentence} for item in found.problems],
        "nodes_behind_them": found.unseen,
    }


def _describe_value(value: Any) -> dict[str, Any]:
    """As it stands in the file: a size without number or name is "?"."""
    tensor = value.type.tensor_type
    shape = [size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in tensor.shape.dim]
    return {"name": value.name, "dtype": _type_name(tensor.elem_type), "shape": shape}


def _type_name(code: int) -> str:
    from onnx import TensorProto

    return TensorProto.DataType.Name(code).lower() if code in TensorProto.DataType.values() else f"number {code}"


def _describe_tensors(model: Any) -> dict[str, Any]:
    """What the tensors say of themselves: elements and bytes by type, and by file beside the model."""
    types: dict[str, Counter[str]] = {}
    files: dict[str, Counter[str]] = {}
    for proto in _tensors(model.graph):
        elements, size = _size(proto)
        types.setdefault(_type_name(proto.data_type), Counter()).update(tensors=1, elements=elements, bytes=size)
        for entry in proto.external_data:
            if entry.key == "location":
                files.setdefault(entry.value, Counter()).update(tensors=1, bytes=size)
    return {
        "tensors": [{"dtype": name, **sums} for name, sums in types.items()],
        "external_files": [{"file": name, **sums} for name, sums in files.items()],
    }


def _tensors(graph: Any) -> Iterator[Any]:
    """Initializers, and those that nodes hold."""
    from graphopt.capture.onnx.graphs import all_graphs

    for inner in all_graphs(graph):
        yield from inner.initializer
        yield from (entry.t for node in inner.node for entry in node.attribute if entry.HasField("t"))


def _size(proto: Any) -> tuple[int, int]:
    from graphopt.capture.onnx.narrow import NARROW
    from graphopt.capture.onnx.tensors import DTYPES

    elements = math.prod(proto.dims)
    if proto.data_type in NARROW:
        return elements, (elements * NARROW[proto.data_type].bits + 7) // 8
    dtype = DTYPES.get(proto.data_type)
    return elements, len(proto.raw_data) if dtype is None else elements * dtype.itemsize


def format_file(report: dict[str, Any]) -> str:
    """Lines on what the file holds."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in report["opsets"].items()) or "none"
    writer = f", written by {report['producer']}" if report["producer"] else ""
    operators = ", ".join(f"{row['operator']} {row['nodes']}" for row in report["operators"]) or "none"
    lines = [f"file     IR version {report['ir_version']}, opsets {opsets}{writer}", f"nodes    {operators}"]
    for row in report["tensors"]:
        lines.append(
            f"tensors  {row['dtype']}: {row['elements']:,} in {row['tensors']} tensors, {format_bytes(row['bytes'])}"
        )
    for row in report["external_files"]:
        lines.append(f"beside   {row['file']}: {row['tensors']} tensors, {format_bytes(row['bytes'])}")
    return "\n".join(lines)


def format_problems(report: dict[str, Any]) -> str:
    """The inputs and outputs of a file of which there is no program to show them, and all that is in the way."""
    parts = []
    for kind in ("inputs", "outputs"):
        rows = [{**item, "shape": format_shape(item["shape"])} for item in report[kind]]
        parts.append(f"{kind}\n{format_table(rows)}")
    if report["problems"]:
        parts.append(f"not imported\n{format_table(report['problems'])}")
    if report["nodes_behind_them"]:
        parts.append(f"{report['nodes_behind_them']} nodes that read their results were not looked at")
    return "\n\n".join(parts)
