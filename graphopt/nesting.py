"""A graph that may end early: what comes after a condition is moved into a branch that runs only when it is needed.

Nested `torch.cond`, one a stop: its predicate is whether every sample is done, its true branch gives the results there
are, its false branch holds all that comes after, the next condition included. Weights, and values that a later part
reads, are operands on every level, as in captured conditions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.analysis.liveness import ancestors
from graphopt.analysis.view import node_kinds
from graphopt.program import PROVENANCE, Program, get_attribute, set_attribute
from graphopt.propagate import evaluate, find_mode, size_key

aten = torch.ops.aten


@dataclass(frozen=True)
class Stop:
    """Where the graph may end: once all of `done` (bool [samples]) is true, with `results` for its outputs."""

    done: Node
    results: tuple[Node, ...]


def nested(program: Program, stops: Sequence[Stop], rule: str) -> GraphModule:
    """The main graph with what is needed after each stop in a branch of its own; `rule` made the new nodes.

    Each stop's results have the types and sizes of the outputs. The last stop's done may depend on all before it.
    """
    return _Nesting(program, stops, rule).main()


class _Nesting:
    """One nesting: which part each node is in, and the graphs as they are built from the outside in."""

    def __init__(self, program: Program, stops: Sequence[Stop], rule: str) -> None:
        self.program, self.stops, self.rule = program, stops, rule
        self.kinds = node_kinds(program)
        self.mode = find_mode(program.graph_module)
        (output,) = program.graph_module.graph.find_nodes(op="output")
        self.results: tuple[Node, ...] = tuple(output.args[0])
        self.part: dict[Node, int] = {}
        for number, stop in enumerate((*stops, Stop(self.results[0], self.results))):
            for end in (stop.done, *stop.results):
                for node in ancestors(end):
                    self.part.setdefault(node, number)

    def main(self) -> GraphModule:
        part = _Part(self, None)
        for node in self.program.graph_module.graph.find_nodes(op="placeholder"):
            part.values[node] = part.copy(node)
        part.build(0)
        return GraphModule(part.root, part.graph, class_name=type(self.program.graph_module).__name__)


class _Part:
    """The graph of one part; what it reads from outside becomes a placeholder, in the main graph an attribute."""

    def __init__(self, nesting: _Nesting, outer: _Part | None) -> None:
        self.nesting, self.outer = nesting, outer
        self.root, self.graph = torch.nn.Module(), Graph()
        self.values: dict[Node, Node] = {}
        self.operands: dict[Node, Node] = {}

    def copy(self, node: Node) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), self.local)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        return new

    def local(self, node: Node) -> Node:
        """The value here of a node of the original graph."""
        if node not in self.values:
            kind = self.nesting.kinds[node]
            if kind == "size":
                self.values[node] = self._size(node)
            elif kind == "constant":
                self.values[node] = self.copy(node)
            elif kind == "module" or (node.op == "get_attr" and self.outer is None):
                set_attribute(self.root, str(node.target), get_attribute(self._module, str(node.target)))
                self.values[node] = self.copy(node)
            else:
                self.values[node] = self.operand(node)
        return self.values[node]

    @property
    def _module(self) -> GraphModule:
        return self.nesting.program.graph_module

    def operand(self, node: Node) -> Node:
        """A placeholder for a value from outside."""
        if node not in self.operands:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                place = self.graph.placeholder(node.name)
            place.meta = {key: value for key, value in node.meta.items() if key == "val"}
            self.operands[node] = self.values[node] = place
        return self.operands[node]

    def _size(self, node: Node) -> Node:
        """A size is read from whatever value here has it, so that nothing is kept for its size alone."""
        value = node.meta["val"]
        symbol = value.node.expr if isinstance(value, torch.SymInt) else None
        for known, here in self.values.items() if symbol is not None and symbol.is_Symbol else ():
            fake = known.meta.get("val")
            if self.nesting.kinds[known] in ("input", "data") and isinstance(fake, torch.Tensor):
                for axis, size in enumerate(fake.shape):
                    if size_key(size) == symbol:
                        new = self.graph.call_function(aten.sym_size.int, (here, axis))
                        new.meta = {**node.meta}
                        return new
        return self.copy(node)

    def build(self, number: int) -> None:
        """Everything of part `number`, then what comes after it."""
        nesting = self.nesting
        for node in nesting.program.graph_module.graph.nodes:
            if nesting.part.get(node) == number and nesting.kinds[node] == "data":
                self.values[node] = self.copy(node)
        if number == len(nesting.stops):
            self.end([self._owned(node) for node in nesting.results])
        else:
            self.end(self._condition(number, nesting.stops[number]))

    def end(self, results: Sequence[Node]) -> None:
        output = self.graph.output(tuple(results))
        output.meta["val"] = tuple(node.meta["val"] for node in results)

    def _owned(self, node: Node) -> Node:
        """A result: never a value from outside itself."""
        here = self.local(node)
        if self.outer is not None and here.op == "placeholder":
            return self._made(aten.clone.default, here, memory_format=torch.contiguous_format)
        return here

    def _condition(self, number: int, stop: Stop) -> list[Node]:
        ended, going = _Part(self.nesting, self), _Part(self.nesting, self)
        ended.end([ended._owned(node) for node in stop.results])
        going.build(number + 1)
        read = list(dict.fromkeys((*going.operands, *ended.operands)))
        graphs = []
        for side, branch in (("true", ended), ("false", going)):
            name = next(name for n in count() if not hasattr(self.root, name := f"{side}_graph_{n}"))
            set_attribute(self.root, name, branch.arranged(read))
            graphs.append(self.graph.get_attr(name))
        done = self.local(stop.done)
        single = list(stop.done.meta["val"].shape) == [1]
        predicate = self._made(aten.view.default, done, []) if single else self._made(aten.all.default, done)
        operands: Any = tuple(self.local(node) for node in read)
        chosen = self.graph.call_function(torch.ops.higher_order.cond, (predicate, *graphs, operands))
        chosen.meta["val"] = tuple(node.meta["val"] for node in self.nesting.results)
        self._mark(chosen)
        return [self._item(chosen, index) for index in range(len(self.nesting.results))]

    def arranged(self, read: Sequence[Node]) -> GraphModule:
        """The branch as a function of all of `read`, in this order."""
        places = [self.operand(node) for node in read]
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        for place in places:
            first.prepend(place)
        return GraphModule(self.root, self.graph)

    def _made(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(node, self.nesting.mode)
        self._mark(node)
        return node

    def _item(self, chosen: Node, index: int) -> Node:
        node = self.graph.call_function(operator.getitem, (chosen, index))
        node.meta["val"] = chosen.meta["val"][index]
        self._mark(node)
        return node

    def _mark(self, node: Node) -> None:
        node.meta["custom"] = {PROVENANCE: {"rule": self.nesting.rule, "from": []}}
