"""Walks the nodes of an ONNX graph and has each one emitted by its operator function."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import graphopt.capture.onnx.operators  # noqa: F401  fills the tables
from graphopt.capture.onnx.attributes import Attributes
from graphopt.capture.onnx.binding import constant
from graphopt.capture.onnx.carriers import carried, declared, is_small, is_unsigned
from graphopt.capture.onnx.control_flow import MOST_TRIPS_TOGETHER, branch, loop
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.external_data import ExternalData
from graphopt.capture.onnx.graphs import all_nodes, operator_name
from graphopt.capture.onnx.ledger import Ledger
from graphopt.capture.onnx.metadata import read_provenance
from graphopt.capture.onnx.narrow import NARROW
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import OPERATORS, SHAPE_OPERATORS
from graphopt.capture.onnx.scan import scan
from graphopt.capture.onnx.standard_functions import called, function_of, has_function
from graphopt.capture.onnx.tensors import FLOAT8, read_narrow, read_tensor
from graphopt.capture.onnx.unsigned import by_bits
from graphopt.capture.onnx.values import KNOWN_ELEMENTS, MOST_KNOWN, Known, Tensor, Value, known_tensor, stays_known
from graphopt.errors import CaptureError, GraphoptError
from graphopt.untrusted.limits import Limits

_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_SETTINGS = {("Resize", 1), ("Resize", 2), ("Clip", 1), ("Clip", 2), ("Pad", 2), ("OneHot", 2)}
_MAKES_VALUES = ("Range", "ConstantOfShape", "Shape", "Size")
_KEEPS_CODES = ("QuantizeLinear", "DequantizeLinear")  # what is stored small stays so, whatever its size
# What fake kernels and array arithmetic raise on arguments that do not go together.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError)
_FOLDED_ELEMENTS = 1 << 16  # of the largest value on the way to a folded one

# What to do about operators of a domain, by the start of their names, the first that fits.
_ADVICE = {
    "com.microsoft.nchwc.": "their layout is that of the processor it was saved on: save it with ORT_ENABLE_EXTENDED",
    "com.microsoft.": "take the model from before ONNX Runtime optimized it, or save it with ORT_ENABLE_BASIC",
    "": "export the model to .pt2 with torch.export.save instead",
}

CONTROL_FLOW = {"If": branch, "Loop": loop, "Scan": scan}  # operators with graphs inside


def is_imported(node: Any, opset: int) -> bool:
    name = operator_name(node)
    return name in OPERATORS or name in CONTROL_FLOW or has_function(node, opset)


def refuse_unknown(model: Any, opset: int) -> None:
    """Raise CaptureError that lists every operator without a function, with the nodes that use it."""
    unknown: dict[str, list[str]] = {}
    for node in all_nodes(model.graph):
        if not is_imported(node, opset):
            unknown.setdefault(operator_name(node), []).append(node.name or next(iter(node.output), ""))
    if unknown:
        listed = "; ".join(f"{name} ({_some(nodes)})" for name, nodes in sorted(unknown.items()))
        advice = next((text for domain, text in _ADVICE.items() if any(name.startswith(domain) for name in unknown)))
        raise CaptureError(
            f"the ONNX model (opset {opset}) has operators that graphopt does not import: {listed}; {advice}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass
class Steps:
    """What reading a graph takes: its nodes, those of a loop's body once for each trip."""

    limits: Limits
    nodes: int = 0
    trips: int = 0

    @property
    def too_many(self) -> bool:
        return self.nodes > self.limits.max_nodes or self.trips > MOST_TRIPS_TOGETHER

    def count(self, *, nodes: int = 0, trips: int = 0) -> None:
        """Raises CaptureError where they are too many."""
        self.nodes, self.trips = self.nodes + nodes, self.trips + trips
        if self.nodes > self.limits.max_nodes:
            raise CaptureError(
                f"the model has over {self.limits.max_nodes} nodes once its loops are written out; "
                "raise Limits.max_nodes"
            )
        if self.too_many:
            raise CaptureError(
                f"the loops of the model take over {MOST_TRIPS_TOGETHER} trips together; export the model to .pt2"
            )


class Importer:
    """Turns nodes into calls of `emitter`; `values` holds what every ONNX name stands for."""

    def __init__(self, emitter: Emitter, opset: int, external: ExternalData, steps: Steps, ledger: Ledger) -> None:
        self.emitter = emitter
        self.opset = opset
        self.external = external
        self.steps = steps
        self.values: dict[str, Value] = {"": None}
        self.ledger = ledger

    def initializers(self, graph: Any) -> None:
        """Small integers and settings are known numbers, other floats parameters, the rest buffers."""
        roles = _inputs_at(graph, _STATISTICS), _inputs_at(graph, _SETTINGS)
        if graph.sparse_initializer:
            raise CaptureError("the ONNX model has sparse tensors, which graphopt does not import; make them dense")
        for proto in graph.initializer:
            self.initializer(graph, proto, roles)

    def initializer(self, graph: Any, proto: Any, roles: tuple[set[str], set[str]]) -> None:
        """`roles`: the names of statistics of norms, and of settings."""
        statistics, settings = roles
        if proto.name in self.values:
            raise CaptureError(f"two values of the ONNX graph are called {proto.name!r}; names must be unique")
        if (narrow := NARROW.get(proto.data_type)) is not None:
            target = self.emitter.weights.add(proto.name, read_narrow(proto, self.external), trainable=False)
            self.values[proto.name] = replace(self.emitter.attribute(target), narrow=narrow)
            return
        tensor = read_tensor(proto, self.external)
        floating = tensor.is_floating_point()
        is_short = tensor.numel() <= KNOWN_ELEMENTS and (not floating or tensor.ndim == 0 or proto.name in settings)
        if is_short and proto.data_type not in FLOAT8:
            self.values[proto.name] = known_tensor(tensor)
            return
        trainable = floating and proto.name not in statistics and proto.data_type not in FLOAT8
        target = self.emitter.weights.add(proto.name, tensor, trainable=trainable)
        self.values[proto.name] = self.emitter.attribute(target)

    def nodes(self, graph: Any) -> None:
        produced = {name for node in graph.node for name in node.output if name}
        for node in graph.node:
            self.node(node, produced)

    def result(self, name: str) -> Tensor:
        value = self.values.get(name)
        if value is None:
            raise CaptureError(f"output {name!r} of the ONNX graph is made by no node; the file is damaged")
        return self.emitter.tensor(value)

    def node(self, node: Any, produced: set[str]) -> None:
        """Emit one node; `produced` are all names that nodes of its graph make. Raises CaptureError."""
        self.steps.count(nodes=1)
        label = f"{node.op_type} {(node.name or next(iter(node.output), ''))!r}"
        inputs = [self._input(name, label, produced) for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        self.emitter.origin, self.emitter.provenance = label, read_provenance(node)
        before = len(self.ledger)
        try:
            results = self._results(node, inputs)
        except GraphoptError as error:
            text = f"ONNX node {label}{_shapes(inputs)}: {error}"
            raise self.ledger.failed(label, node.op_type, inputs, text, error) from error
        except _REFUSALS as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            text = f"ONNX node {label}{_shapes(inputs)} cannot be imported: {reason}"
            raise self.ledger.failed(label, node.op_type, inputs, text, error) from error
        if len(self.ledger) > before:
            self.ledger.record(label, node.op_type, inputs, before)
        for name, value in zip(node.output, results, strict=False):
            if name in self.values and name:
                raise CaptureError(f"two values of the ONNX graph are called {name!r}; names must be unique")
            if name:
                self.values[name] = value

    def _input(self, name: str, label: str, produced: set[str]) -> Value:
        if name not in self.values:
            later = (
                "only a later node makes: the graph has a cycle or is not in order"
                if name in produced
                else ("nothing makes: the file is damaged")
            )
            raise CaptureError(f"ONNX node {label} reads {name!r}, which {later}")
        return self.values[name]

    def _results(self, node: Any, inputs: list[Value]) -> tuple[Value, ...]:
        used = [index for index, name in enumerate(node.output) if name]
        attributes = Attributes(node, self.external)
        name = operator_name(node)
        op = Operation(name, attributes, self.opset, max(used, default=-1) + 1, self.emitter)
        if name in CONTROL_FLOW:
            return CONTROL_FLOW[name](self, op, inputs)
        if name not in OPERATORS:
            return self._written_out(node, inputs)
        result: Any = None
        present = [value for value in inputs if value is not None]
        is_constant = bool(present) and all(isinstance(value, Known) for value in present)
        if is_constant and name in SHAPE_OPERATORS and not any(map(is_unsigned, present)):
            result = _run(SHAPE_OPERATORS[name], op, inputs)
            if not self._stay_known(result if isinstance(result, tuple) else (result,)):
                result = None
        if result is None:
            result = self._emitted(op, node, inputs, fold=is_constant and name not in _MAKES_VALUES + _KEEPS_CODES)
        if unread := attributes.unread():
            raise CaptureError(f"attribute {unread[0]!r} is not imported; export the model without it")
        return result if isinstance(result, tuple) else (result,)

    def _written_out(self, node: Any, inputs: list[Value]) -> tuple[Value, ...]:
        """The function that the standard defines the operator by, in its place."""
        if not has_function(node, self.opset):
            raise CaptureError(f"{operator_name(node)} is not imported; {_ADVICE['']}")
        function, opset = function_of(node, self.opset, inputs)
        inner = Importer(self.emitter, opset, self.external, self.steps, self.ledger)
        inner.values = called(function, inputs)
        inner.nodes(function)
        return tuple(inner.values.get(name) for name in function.output)

    def _stay_known(self, results: tuple[Any, ...]) -> bool:
        arrays = [value for value in results if isinstance(value, Known)]
        for item in (item for value in arrays if value.array.size <= MOST_KNOWN for item in value.array.flat):
            self.emitter.refuse_long(item)
        return all(map(stays_known, arrays))

    def _emitted(self, op: Operation, node: Any, inputs: list[Value], fold: bool) -> Any:
        if fold and any(value.symbolic for value in inputs if isinstance(value, Known)):
            fold = False
        result = by_bits(op, inputs)
        if result is None:
            result = declared(op, node, inputs, _run(OPERATORS[op.name], op, carried(op, inputs)))
        return self._folded(result) if fold else result

    def _folded(self, result: Any) -> Any:
        """What nodes compute from constants alone; the nodes themselves stay unread and go."""
        results = result if isinstance(result, tuple) else (result,)
        tensors = [value for value in results if isinstance(value, Tensor)]
        if any(value.fake.numel() > KNOWN_ELEMENTS or is_small(value) for value in tensors):
            return result
        numbers = {value: constant(self.emitter, value.node, _FOLDED_ELEMENTS) for value in tensors}
        if any(number is None for number in numbers.values()):
            return result
        done = [numbers.get(value, value) for value in results]
        return tuple(done) if isinstance(result, tuple) else done[0]

    def inside(self, emitter: Emitter) -> Importer:
        """An importer of a graph within this one, which reads the values there are so far."""
        inner = Importer(emitter, self.opset, self.external, self.steps, self.ledger)
        inner.values = dict(self.values)
        return inner


def _inputs_at(graph: Any, places: set[tuple[str, int]]) -> set[str]:
    """The names that nodes read at these places, each an operator and the number of an input."""
    operators = {operator for operator, _ in places}
    readers = [node for node in graph.node if node.op_type in operators]
    return {name for node in readers for place, name in enumerate(node.input) if (node.op_type, place) in places}


def _run(function: Any, op: Operation, inputs: list[Value]) -> Any:
    least, most, needed = _arity(function)
    if not least <= len(inputs) <= most:
        raise CaptureError(f"it has {len(inputs)} inputs, and graphopt imports {op.name} with {_count(least, most)}")
    for place in needed:
        if inputs[place] is None:
            raise CaptureError(f"input {place} is left out, which {op.name} needs")
    return function(op, *inputs)


@cache
def _arity(function: Any) -> tuple[int, float, list[int]]:
    """The least and the largest number of inputs, and which may not be left out: `Value` says that one may."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    least = sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters)
    most = float("inf") if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)
    return least, most, [place for place, p in enumerate(parameters[:least]) if p.annotation != "Value"]


def _count(least: int, most: float) -> str:
    if least == most:
        return str(least)
    return f"{least} or more" if most == float("inf") else f"{least} to {most}"


def _shapes(inputs: list[Value]) -> str:
    shapes = [
        "none" if value is None else str([str(size) for size in value.shape]).replace("'", "") for value in inputs
    ]
    return f" of {', '.join(shapes)}" if shapes else ""


def repeated(names: list[str]) -> str | None:
    """A name that occurs twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
