"""The functions that a model defines itself are written out where they are called."""

from __future__ import annotations

from typing import Any

from graphopt.capture.onnx.graphs import all_nodes
from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits

_MOST_CALLS = 100  # within one another; the inliner's own stack is not deeper


def inlined(model: Any, limits: Limits) -> Any:
    """A model without functions. Raises CaptureError where it would be over a limit: each call copies its function."""
    from onnx.inliner import inline_local_functions

    _refuse_growth(model, limits)
    try:
        return inline_local_functions(model)
    except Exception as error:  # native code that raises anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"the model's own functions cannot be written out: {lines[0]}") from error


def _refuse_growth(model: Any, limits: Limits) -> None:
    functions = {(item.domain, item.name, item.overload): item for item in model.functions}
    written: dict[tuple[str, str, str], tuple[int, int, int]] = {}

    def measure(owner: Any, calls: tuple[tuple[str, str, str], ...]) -> tuple[int, int, int]:
        """Nodes, bytes and depth of a graph or function with all that it calls."""
        count = size = depth = 0
        for node in all_nodes(owner):
            key = node.domain, node.op_type, node.overload
            if key in calls:
                raise CaptureError(f"the model's own function {node.op_type!r} calls itself; the file is damaged")
            if key in functions and len(calls) < _MOST_CALLS and key not in written:
                written[key] = measure(functions[key], (*calls, key))
            more = written.get(key, (1, node.ByteSize(), -1 if key not in functions else _MOST_CALLS))
            count, size, depth = count + more[0], size + more[1], max(depth, more[2] + 1)
        return count, size, depth

    count, size, depth = measure(model.graph, ())
    if depth > _MOST_CALLS:
        raise CaptureError(f"the model's own functions call one another over {_MOST_CALLS} deep; write them as fewer")
    if count > limits.max_nodes:
        raise CaptureError(
            f"the model has {count} nodes with its own functions written out, over the limit of {limits.max_nodes}; "
            "raise Limits.max_nodes"
        )
    if size > limits.max_graph_bytes:
        raise CaptureError(
            f"the model's nodes take {size} bytes with its own functions written out, over the limit of "
            f"{limits.max_graph_bytes}; raise Limits.max_graph_bytes"
        )
