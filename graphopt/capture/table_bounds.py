"""Bounds of sizes that follow from position tables: a sequence cannot be longer than the table it counts along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt.capture.domains import operator_name
from graphopt.program import SizeRange

# Operators whose result holds no value that their first argument does not hold.
_SAME_VALUES = ("_to_copy", "to", "view", "reshape", "unsqueeze", "squeeze", "expand", "clone", "slice", "alias")


def limit_by_tables(
    module: GraphModule, symbols: Mapping[str, str], sizes: Mapping[str, SizeRange]
) -> dict[str, SizeRange]:
    """Lower the upper bound of every size `n` for which an embedding looks up the positions 0 to n - 1."""
    limited = dict(sizes)
    for node in module.graph.nodes:
        if node.op != "call_function" or operator_name(node) != "embedding":
            continue
        table, index = node.args[:2]
        rows = table.meta["val"].shape[0]
        counted = _counted(index)
        if counted is None or not isinstance(rows, int):
            continue
        symbol, offset = counted
        name = symbols.get(symbol)
        if name is not None:
            high, limit = limited[name].high, rows - offset
            limited[name] = replace(limited[name], high=limit if high is None else min(high, limit))
    return limited


def _counted(index: Node) -> tuple[str, int] | None:
    """(symbol, offset) when the index holds arange(symbol) + offset."""
    offset = 0
    while (name := operator_name(index)) != "arange":
        arguments: Any = index.args
        if name == "add" and len(arguments) == 2 and isinstance(arguments[1], int):
            offset += arguments[1]
        elif name not in _SAME_VALUES:
            return None
        index = arguments[0]
    start: Any
    end: Any
    start, end = (0, index.args[0]) if len(index.args) == 1 else (index.args[0], index.args[1])
    value = end.meta.get("val") if isinstance(end, Node) else None
    if start != 0 or not isinstance(value, torch.SymInt) or not value.node.expr.is_Symbol:
        return None
    return str(value.node.expr), offset
