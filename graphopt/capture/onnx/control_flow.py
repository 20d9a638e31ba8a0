"""If and Loop: a known condition chooses a branch now, another one becomes `torch.cond`; known loops are unrolled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from graphopt.capture.normal_form import remove_dead
from graphopt.capture.onnx.carriers import type_name
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.values import Tensor, Value, known
from graphopt.errors import CaptureError
from graphopt.propagate import shape_key, size_key

if TYPE_CHECKING:
    from graphopt.capture.onnx.importer import Importer

aten = torch.ops.aten

MOST_TRIPS = 1000  # of a loop: each one is written out
MOST_TRIPS_TOGETHER = 10_000  # of all loops, those within others included


class BranchEmitter(Emitter):
    """Builds the graph of one branch: whatever it reads from outside, weights too, is an operand."""

    def __init__(self, outer: Emitter) -> None:
        super().__init__(outer.mode, outer.binding)
        self.weights = outer.weights
        self.origin, self.provenance = outer.origin, outer.provenance
        self._outer = outer
        self._interned, self._results, self._terms = outer._interned, outer._results, outer._terms
        self._transposed = outer._transposed
        self._holder = torch.nn.Module()
        self.operands: dict[Node, Tensor] = {}  # a node outside -> its placeholder here
        self._outside: dict[Node, Node] = {}  # and back

    def attribute(self, target: str) -> Tensor:
        return self.local(self._outer.attribute(target))

    def local(self, value: Tensor) -> Tensor:
        if value.node.graph is self.graph:
            return value
        outside = self._outer.local(value)
        if outside.node not in self.operands:
            with self.graph.inserting_before():
                node = self.graph.placeholder(outside.node.name)
            node.meta["val"] = outside.fake
            self.operands[outside.node] = Tensor(node, outside.fake)
            self._outside[node] = outside.node
        return self.operands[outside.node]

    def outside(self, node: Node) -> tuple[Emitter, Node] | None:
        if node.graph is not self.graph:
            return self._outer.outside(node)
        return (self._outer, self._outside[node]) if node in self._outside else None

    def held(self, node: Node) -> torch.Tensor | None:
        if node.graph is not self.graph:
            return self._outer.held(node)
        return self._outer.held(self._outside[node]) if node in self._outside else None

    def holder(self) -> torch.nn.Module:
        return self._holder

    def finish(self, results: Sequence[Tensor], operands: Sequence[Tensor]) -> GraphModule:
        """The branch as a function of all operands, in this order; no result may be an operand itself."""
        fresh = [self.call(aten.clone.default, value) if value.node.op == "placeholder" else value for value in results]
        output = self.graph.output(tuple(value.node for value in fresh))
        output.meta["val"] = tuple(value.fake for value in fresh)
        places = [self.local(value).node for value in operands]
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        for node in places:
            first.prepend(node)
        return GraphModule(self._holder, self.graph)

    def _outer_size(self, symbol: Any) -> Node:
        outside = self._outer._expression(symbol)
        source, axis = outside.args
        assert isinstance(source, Node)
        inner = self.local(Tensor(source, source.meta["val"]))
        node = self.graph.call_function(aten.sym_size.int, (inner.node, axis))
        node.meta["val"] = outside.meta["val"]
        return node


def branch(importer: Importer, op: Operation, inputs: list[Value]) -> tuple[Value, ...]:
    """If: where the condition is known, the other branch is not part of the model."""
    then, otherwise = (op.attributes.graph(name) for name in ("then_branch", "else_branch"))
    if then is None or otherwise is None:
        raise CaptureError("an If needs then_branch and else_branch; the file is damaged")
    condition = op.scalar(inputs[0]) if inputs else None
    if isinstance(condition, bool):
        inner = importer.inside(importer.emitter)
        graph = then if condition else otherwise
        inner.initializers(graph)
        inner.nodes(graph)
        return tuple(inner.values.get(output.name) for output in graph.output)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dtype != torch.bool:
        raise CaptureError("the condition of an If must be one bool")
    return tuple(_conditional(importer, op, inputs[0], (then, otherwise)))


def _conditional(importer: Importer, op: Operation, condition: Tensor, graphs: Sequence[Any]) -> list[Tensor]:
    if any(size != 1 for size in condition.shape):
        raise CaptureError(f"the condition of an If has the shape {list(condition.shape)}; it must be one bool")
    outer = importer.emitter
    predicate = outer.reshape(outer.local(condition), []) if condition.shape else condition
    sides = []
    for graph in graphs:
        emitter = BranchEmitter(outer)
        inner = importer.inside(emitter)
        inner.initializers(graph)
        inner.nodes(graph)
        values = [inner.result(value.name) for value in graph.output]
        results = [replace(_row_major(emitter, emitter.local(value)), narrow=value.narrow) for value in values]
        sides.append((emitter, results))
    if reason := _unlike(sides[0][1], sides[1][1]):
        op.number(condition, f"{reason}; its condition", reason)  # bound to an example, it leaves one branch
        raise CaptureError(reason)
    if not sides[0][1]:
        return []
    read = dict.fromkeys(node for emitter, _ in sides for node in emitter.operands)
    operands = [Tensor(node, node.meta["val"]) for node in read]
    modules = [emitter.finish(results, operands) for emitter, results in sides]
    for module in modules:
        remove_dead(module.graph)
        module.recompile()
    made = outer.cond(predicate, modules, operands)
    return [replace(value, narrow=like.narrow) for value, like in zip(made, sides[0][1], strict=True)]


def _row_major(emitter: BranchEmitter, value: Tensor) -> Tensor:
    """Both branches must agree in strides, so both are contiguous."""
    with emitter.mode:
        plain = torch.empty(value.fake.shape, dtype=value.dtype).stride()
    if tuple(map(size_key, plain)) == tuple(map(size_key, value.fake.stride())):
        return value
    contiguous: Tensor = emitter.call(aten.clone.default, value, memory_format=torch.contiguous_format)
    return contiguous


def _unlike(then: Sequence[Tensor], otherwise: Sequence[Tensor]) -> str | None:
    """Why the results of two branches cannot be those of one node."""
    if len(then) != len(otherwise):
        return f"the branches of an If have {len(then)} and {len(otherwise)} outputs; the file is damaged"
    for place, (left, right) in enumerate(zip(then, otherwise, strict=True)):
        kinds = [(type_name(value), shape_key(value.fake)) for value in (left, right)]
        if kinds[0] != kinds[1]:
            said = " and ".join(f"{dtype} {list(map(str, shape))}".replace("'", "") for dtype, shape in kinds)
            return (
                f"output {place} of the If is {said} in its branches; they must have one type and shape when the "
                "condition is only known at run time"
            )
    return None


def loop(importer: Importer, op: Operation, inputs: list[Value]) -> tuple[Value, ...]:
    """Loop, written out: its trip count and its condition must be known at import."""
    body = op.attributes.graph("body")
    if body is None:
        raise CaptureError("a Loop needs a body; the file is damaged")
    trips, going, *carried = [*inputs, None, None][: max(2, len(inputs))]
    what = "the number of trips of a Loop"
    fixed = f"{what} must be a constant; export the model to .pt2"
    count = MOST_TRIPS + 1 if trips is None else op.number(trips, what, fixed)  # `going` ends a Loop that says none
    if not isinstance(count, int):
        raise CaptureError(fixed)
    if len(body.input) != len(carried) + 2 or len(body.output) < len(carried) + 1:
        raise CaptureError("the body of the Loop does not fit its inputs; the file is damaged")
    shared = importer.inside(importer.emitter)
    shared.initializers(body)
    collected: list[list[Tensor]] = [[] for _ in body.output[len(carried) + 1 :]]
    names = [value.name for value in body.input]
    for trip in range(count):
        importer.steps.count(trips=1)
        if going is not None and not _goes_on(op, going):
            break
        if trip == MOST_TRIPS:
            raise CaptureError(f"a Loop of over {MOST_TRIPS} trips is not imported; export the model to .pt2")
        inner = shared.inside(importer.emitter)
        inner.values |= dict(zip(names, (known(trip), known(True, torch.bool), *carried), strict=True))
        inner.nodes(body)
        going, *results = [inner.values.get(value.name) for value in body.output]
        if going is None or any(value is None for value in results):
            raise CaptureError("an output of the Loop's body is made by no node; the file is damaged")
        carried = results[: len(carried)]
        for kept, value in zip(collected, results[len(carried) :], strict=True):
            assert value is not None
            kept.append(importer.emitter.tensor(value))
    if collected and not collected[0]:
        raise CaptureError("a Loop without trips has scan outputs, whose shape nothing gives; leave the Loop out")
    return (*carried, *(op.call(aten.stack.default, kept) for kept in collected))


def _goes_on(op: Operation, condition: Value) -> bool:
    refusal = "a Loop that ends by values at run time is not imported; export the model to .pt2"
    known_condition = op.number(condition, "the condition of a Loop", refusal)
    if not isinstance(known_condition, bool):
        raise CaptureError(refusal)
    return known_condition
