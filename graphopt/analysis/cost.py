"""What nodes and regions of a program cost at given sizes: multiply-accumulates and bytes.

Bytes are those of the graph as it stands, each call by itself: whatever a compiler fuses moves less. A view costs
nothing, an axis that is only repeated counts once, and a table is read as far as rows are taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node

from graphopt.aliasing import is_view, memory_root
from graphopt.analysis.macs import LOOKUPS, Call, count_elementwise, count_macs, operator_name
from graphopt.analysis.view import Kind, node_kinds, tensors
from graphopt.errors import FeedError, UnknownNameError
from graphopt.program import Program
from graphopt.propagate import size_key


@dataclass(frozen=True)
class Cost:
    """`read` and `written` are bytes of activations; `weights` has the bytes read of each weight by its name.

    `elementwise` are single floating-point operations outside of multiply-accumulates.
    """

    macs: int = 0
    elementwise: int = 0
    read: int = 0
    written: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that are read, each weight once."""
        return sum(self.weights.values())

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.read + self.written + self.weight_bytes


def total_cost(costs: Iterable[Cost]) -> Cost:
    """The sum; a weight that several read counts once."""
    macs = elementwise = read = written = 0
    weights: dict[str, int] = {}
    for cost in costs:
        macs, elementwise = macs + cost.macs, elementwise + cost.elementwise
        read, written = read + cost.read, written + cost.written
        for name, count in cost.weights.items():
            weights[name] = max(count, weights.get(name, 0))
    return Cost(macs, elementwise, read, written, weights)


def node_costs(program: Program, sizes: Mapping[str, int] | None = None, path: str = "") -> dict[Node, Cost]:
    """The cost of every node of the graph at `path`; a `torch.cond` costs what the dearer of its branches does.

    `sizes` gives values for names in `program.sizes`; those left out are as in the examples. Raises UnknownNameError
    for other names, and FeedError for a size that has no value.
    """
    return _node_costs(program, _Sizes(program, sizes or {}), path)


def _node_costs(program: Program, sizes: _Sizes, path: str) -> dict[Node, Cost]:
    kinds = node_kinds(program, path)
    costs = {}
    for node in kinds:
        inner = [argument for argument in node.all_input_nodes if kinds[argument] == "module"]
        if node.op == "call_function" and inner:
            names = [f"{path}.{argument.target}".lstrip(".") for argument in inner]
            branches = [total_cost(_node_costs(program, sizes, name).values()) for name in names]
            dearest = max(range(len(names)), key=lambda index: branches[index].macs)
            costs[node] = _outside(program, names[dearest], node, branches[dearest])
        else:
            costs[node] = _node_cost(kinds, node, sizes.shape)
    return costs


def _outside(program: Program, path: str, call: Node, cost: Cost) -> Cost:
    """The cost of a sub-graph with weights under the names that its caller has for them."""
    placeholders = dict(program.graphs())[path].graph.find_nodes(op="placeholder")
    operands: Any = call.args[-1]
    names = {
        str(inside.target): str(memory_root(operand).target)
        for inside, operand in zip(placeholders, operands, strict=False)
        if isinstance(operand, Node)
    }
    weights = {names.get(name, name): count for name, count in cost.weights.items()}
    return Cost(cost.macs, cost.elementwise, cost.read, cost.written, weights)


def _node_cost(kinds: Mapping[Node, Kind], node: Node, shape_of: Callable[[torch.Tensor], tuple[int, ...]]) -> Cost:
    if node.op != "call_function" or kinds[node] == "size" or is_view(node) or not tensors(node):
        return Cost()

    def count(value: torch.Tensor) -> int:
        pairs = zip(shape_of(value), value.stride(), strict=True)
        return value.dtype.itemsize * prod(size for size, step in pairs if size_key(step) != 0)

    written = sum(map(count, tensors(node)))
    lookup = operator_name(node) in LOOKUPS
    read, weights = 0, {}
    for index, argument in enumerate(node.all_input_nodes):
        amount = sum(map(count, tensors(argument)))
        amount = min(amount, written) if lookup and index == 0 else amount
        root = memory_root(argument)
        if kinds[root] == "weight":
            weights[str(root.target)] = amount
        else:
            read += amount
    call = Call(node, shape_of)
    return Cost(count_macs(call), count_elementwise(call), read, written, weights)


class _Sizes:
    """Shapes as integers, at the sizes asked for."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        for name in sizes:
            if name not in program.sizes:
                raise UnknownNameError("size", name, program.sizes)
        values = {**(program.bind(program.examples) if program.examples else {}), **sizes}
        self._symbols = {symbol: values[name] for symbol, name in program.symbols.items() if name in values}
        self._names = program.symbols
        self._known: dict[Any, int] = {}

    def shape(self, value: torch.Tensor) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else self._value(size_key(size)) for size in value.shape)

    def _value(self, expression: Any) -> int:
        if expression not in self._known:
            symbols = getattr(expression, "free_symbols", ())
            for symbol in symbols:
                if symbol.name not in self._symbols:
                    name = self._names.get(symbol.name, symbol.name)
                    raise FeedError(f"size {name!r} has no value; give one, sizes={{{name!r}: 128}}")
            self._known[expression] = int(
                expression.subs({symbol: self._symbols[symbol.name] for symbol in symbols}) if symbols else expression
            )
        return self._known[expression]
