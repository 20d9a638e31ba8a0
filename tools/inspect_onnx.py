"""What an ONNX file says of itself: who wrote it, its opsets, inputs and operators, and which of these are imported."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.tools.table import format_shape, format_table


def describe_file(path: str) -> dict[str, Any]:
    """JSON-able; nothing is imported, so that it also serves for files that cannot be. Raises CaptureError."""
    import graphopt.capture.onnx.operators  # noqa: F401  fills the table
    from graphopt.capture.onnx.graphs import all_nodes, operator_name
    from graphopt.capture.onnx.importer import CONTROL_FLOW
    from graphopt.capture.onnx.reading import read_model
    from graphopt.capture.onnx.registry import OPERATORS
    from graphopt.untrusted.limits import Limits

    model, _ = read_model(path, Limits())
    nodes = list(all_nodes(model.graph))
    counts, used = Counter(map(operator_name, nodes)), {node.domain for node in nodes}
    held = {proto.name for proto in model.graph.initializer}
    return {
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "opsets": {o.domain or "onnx": o.version for o in model.opset_import if o.domain in used},
        "inputs": [_describe_input(value) for value in model.graph.input if value.name not in held],
        "operators": [
            {"operator": name, "nodes": count, "imported": name in OPERATORS or name in CONTROL_FLOW}
            for name, count in counts.most_common()
        ],
    }


def _describe_input(value: Any) -> dict[str, Any]:
    """As it stands in the file: a size without number or name is "?"."""
    from onnx import TensorProto

    tensor = value.type.tensor_type
    code = tensor.elem_type
    known = code in TensorProto.DataType.values()
    shape = [size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in tensor.shape.dim]
    dtype = TensorProto.DataType.Name(code).lower() if known else f"number {code}"
    return {"name": value.name, "dtype": dtype, "shape": shape}


def format_file(report: dict[str, Any], interface: bool) -> str:
    """`interface`: with the inputs, for a file of which there is no program to show them."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in report["opsets"].items())
    parts = [f"file  opsets {opsets}" + (f", written by {report['producer']}" if report["producer"] else "")]
    if interface and report["inputs"]:
        parts.append(format_table([{**item, "shape": format_shape(item["shape"])} for item in report["inputs"]]))
    missing = [row for row in report["operators"] if not row["imported"]]
    if missing:
        rows = [{"operator": row["operator"], "nodes": row["nodes"]} for row in missing]
        parts.append(f"operators that are not imported\n{format_table(rows)}")
    return "\n\n".join(parts)
