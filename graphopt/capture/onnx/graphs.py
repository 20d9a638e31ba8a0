"""Walks the graphs of an ONNX model, those of branches and loop bodies included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

DOMAINS = ("", "ai.onnx")  # of the standard operators


def operator_name(node: Any) -> str:
    """With the domain in front where it is not the standard one."""
    return node.op_type if node.domain in DOMAINS else f"{node.domain}.{node.op_type}"


def all_graphs(graph: Any) -> Iterator[Any]:
    """The graph itself, and those of branches and loop bodies."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                yield from all_graphs(branch)


def all_nodes(graph: Any) -> Iterator[Any]:
    """Every node, those of branches and loop bodies included."""
    return (node for inner in all_graphs(graph) for node in inner.node)
