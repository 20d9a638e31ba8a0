"""Walks the nodes of an ONNX graph and has each one emitted by its operator function."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

import graphopt.capture.onnx.operators  # noqa: F401  fills the tables
from graphopt.capture.onnx.attributes import Attributes
from graphopt.capture.onnx.carriers import carried, declared, is_unsigned
from graphopt.capture.onnx.control_flow import branch, loop
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.metadata import read_provenance
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.reading import all_nodes, operator_name
from graphopt.capture.onnx.registry import OPERATORS, SHAPE_OPERATORS
from graphopt.capture.onnx.tensors import FLOAT8, FOUR_BITS, read_four_bits, read_tensor
from graphopt.capture.onnx.values import KNOWN_ELEMENTS, Known, Tensor, Value, known_tensor
from graphopt.errors import CaptureError, GraphoptError

_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_SETTINGS = {("Resize", 1), ("Resize", 2), ("Clip", 1), ("Clip", 2), ("Pad", 2), ("OneHot", 2)}
_MAKES_VALUES = ("Range", "ConstantOfShape", "Shape", "Size")
_READS_CODES = {("DequantizeLinear", 0), ("DequantizeLinear", 2)}
_KEEPS_CODES = ("QuantizeLinear", "DequantizeLinear")  # what is stored small stays so, whatever its size
# What fake kernels and array arithmetic raise on arguments that do not go together.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError)
_FOLDED_ELEMENTS = 1 << 16  # of the largest value on the way to a folded one

CONTROL_FLOW = {"If": branch, "Loop": loop}  # operators with graphs inside


def refuse_unknown(model: Any, opset: int) -> None:
    """Raise CaptureError that lists every operator without a function, with the nodes that use it."""
    unknown: dict[str, list[str]] = {}
    for node in all_nodes(model.graph):
        name = operator_name(node)
        if name not in OPERATORS and name not in CONTROL_FLOW:
            unknown.setdefault(name, []).append(node.name or next(iter(node.output), ""))
    if unknown:
        listed = "; ".join(f"{name} ({_some(nodes)})" for name, nodes in sorted(unknown.items()))
        raise CaptureError(
            f"the ONNX model (opset {opset}) has operators that graphopt does not import: {listed}; "
            "export the model to .pt2 with torch.export.save instead"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Importer:
    """Turns nodes into calls of `emitter`; `values` holds what every ONNX name stands for."""

    def __init__(self, emitter: Emitter, opset: int, folder: Path | None) -> None:
        self.emitter = emitter
        self.opset = opset
        self.folder = folder
        self.values: dict[str, Value] = {"": None}
        self.ledger: dict[str, list[str]] = {}  # node -> guards on sizes that it brought

    def initializers(self, graph: Any) -> None:
        """Small integers and settings are known numbers, other floats parameters, the rest buffers."""
        statistics, settings = _inputs_at(graph, _STATISTICS), _inputs_at(graph, _SETTINGS)
        if graph.sparse_initializer:
            raise CaptureError("the ONNX model has sparse tensors, which graphopt does not import; make them dense")
        for proto in graph.initializer:
            if proto.name in self.values:
                raise CaptureError(f"two values of the ONNX graph are called {proto.name!r}; names must be unique")
            if proto.data_type in FOUR_BITS:
                self._codes(graph, proto)
                continue
            tensor = read_tensor(proto, self.folder)
            if proto.data_type in FLOAT8:
                self.values[proto.name] = self.emitter.attribute(
                    self.emitter.weights.add(proto.name, tensor, trainable=False)
                )
                continue
            floating = tensor.is_floating_point()
            if tensor.numel() <= KNOWN_ELEMENTS and (not floating or tensor.ndim == 0 or proto.name in settings):
                self.values[proto.name] = known_tensor(tensor)
                continue
            trainable = floating and proto.name not in statistics
            target = self.emitter.weights.add(proto.name, tensor, trainable=trainable)
            self.values[proto.name] = self.emitter.attribute(target)

    def _codes(self, graph: Any, proto: Any) -> None:
        """Codes of 4 bits in bytes, for readers that do not tell them from codes of 8."""
        readers = ((node.op_type, place, name) for node in graph.node for place, name in enumerate(node.input))
        roles = {(operator, place) for operator, place, name in readers if name == proto.name}
        if not roles <= _READS_CODES or proto.name in {value.name for value in graph.output}:
            name, other = proto.name, next(iter(sorted(roles - _READS_CODES)), ("the output", 0))[0]
            raise CaptureError(f"{other} reads {name!r} of 4-bit type, which is only imported for DequantizeLinear")
        target = self.emitter.weights.add(proto.name, read_four_bits(proto, self.folder), trainable=False)
        self.emitter.weights.codes[target] = FOUR_BITS[proto.data_type][1]
        self.values[proto.name] = self.emitter.attribute(target)

    def nodes(self, graph: Any) -> None:
        produced = {name for node in graph.node for name in node.output if name}
        for node in graph.node:
            self._node(node, produced)

    def result(self, name: str) -> Tensor:
        value = self.values.get(name)
        if value is None:
            raise CaptureError(f"output {name!r} of the ONNX graph is made by no node; the file is damaged")
        return self.emitter.tensor(value)

    def _node(self, node: Any, produced: set[str]) -> None:
        label = f"{node.op_type} {(node.name or next(iter(node.output), ''))!r}"
        inputs = [self._input(name, label, produced) for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        self.emitter.origin, self.emitter.provenance = label, read_provenance(node)
        environment = self.emitter.mode.shape_env
        assert environment is not None
        before = len(environment.guards)
        try:
            results = self._results(node, inputs)
        except GraphoptError as error:
            raise CaptureError(f"ONNX node {label}{_shapes(inputs)}: {error}") from error
        except _REFUSALS as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CaptureError(f"ONNX node {label}{_shapes(inputs)} cannot be imported: {reason}") from error
        if len(environment.guards) > before:
            self.ledger.setdefault(label, []).extend(str(guard.expr) for guard in environment.guards[before:])
            self._refuse_fixed(environment, label)
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

    def _refuse_fixed(self, environment: ShapeEnv, label: str) -> None:
        for symbol, value in environment.replacements.items():
            if value.is_number:
                raise CaptureError(
                    f"ONNX node {label} only works where the dynamic size {symbol} is {value}; give that axis the "
                    f"number {value} in the file"
                )

    def _results(self, node: Any, inputs: list[Value]) -> tuple[Value, ...]:
        used = [index for index, name in enumerate(node.output) if name]
        attributes = Attributes(node, self.folder)
        name = operator_name(node)
        op = Operation(name, attributes, self.opset, max(used, default=-1) + 1, self.emitter)
        if name in CONTROL_FLOW:
            return CONTROL_FLOW[name](self, op, inputs)
        result: Any = None
        present = [value for value in inputs if value is not None]
        constant = bool(present) and all(isinstance(value, Known) for value in present)
        if constant and name in SHAPE_OPERATORS and not any(map(is_unsigned, present)):
            result = _run(SHAPE_OPERATORS[name], op, inputs)
        if result is None:
            result = self._emitted(op, node, inputs, fold=constant and name not in _MAKES_VALUES + _KEEPS_CODES)
        if unread := attributes.unread():
            raise CaptureError(f"attribute {unread[0]!r} is not imported; export the model without it")
        return result if isinstance(result, tuple) else (result,)

    def _emitted(self, op: Operation, node: Any, inputs: list[Value], fold: bool) -> Any:
        if fold and any(value.symbolic for value in inputs if isinstance(value, Known)):
            fold = False
        last = next(iter(reversed(self.emitter.graph.nodes)), None)
        result = declared(op, node, inputs, _run(OPERATORS[op.name], op, carried(op, inputs)))
        return self._folded(result, last) if fold else result

    def _folded(self, result: Any, last: Any) -> Any:
        """What the nodes after `last` compute from constants alone; the nodes themselves stay unread and go."""
        results = result if isinstance(result, tuple) else (result,)
        nodes = []
        for node in reversed(self.emitter.graph.nodes):
            if node is last:
                break
            nodes.append(node)
        sizes = [leaf.numel() for node in nodes for leaf in pytree.tree_leaves(node.meta["val"])]
        if any(not isinstance(size, int) or size > _FOLDED_ELEMENTS for size in sizes):
            return result
        if any(isinstance(value, Tensor) and value.fake.numel() > KNOWN_ELEMENTS for value in results):
            return result
        real: dict[Any, Any] = {}

        def value_of(node: Any) -> Any:
            if node not in real:
                real[node] = self.emitter.held(node)
                if real[node] is None:
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
                    real[node] = node.target(*args, **kwargs)
            return real[node]

        with torch.no_grad():
            done = [known_tensor(value_of(v.node)) if isinstance(v, Tensor) else v for v in results]
        return tuple(done) if isinstance(result, tuple) else done[0]

    def inside(self, emitter: Emitter) -> Importer:
        """An importer of a graph within this one, which reads the values there are so far."""
        inner = Importer(emitter, self.opset, self.folder)
        inner.values, inner.ledger = dict(self.values), self.ledger
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
