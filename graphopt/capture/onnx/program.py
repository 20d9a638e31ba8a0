"""From an ONNX model to a Program in normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from graphopt.capture.asked_memory import refuse_large_inputs
from graphopt.capture.dynamic import name_axes, read_request
from graphopt.capture.exported import Known, assemble, match_examples
from graphopt.capture.inputs import draw_inputs
from graphopt.capture.least_sizes import raise_least_sizes
from graphopt.capture.normal_form import Flat, remove_dead
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.importer import Importer, refuse_unknown, repeated
from graphopt.capture.onnx.metadata import exits_of
from graphopt.capture.onnx.reading import opset_of, read_model
from graphopt.capture.onnx.sizes import (
    Input,
    Symbols,
    fake_input,
    hint_choices,
    make_symbols,
    read_inputs,
    renamed,
    size_names,
)
from graphopt.capture.quiet import quiet
from graphopt.capture.raising import raised
from graphopt.errors import CaptureError, FeedError
from graphopt.program import Program, placeholder_name
from graphopt.untrusted.limits import Limits


def from_onnx(
    source: Any,
    example_inputs: Any,
    dynamic_shapes: Mapping[str, Any] | None,
    *,
    name: str,
    limits: Limits,
) -> Program:
    """Import a ModelProto or the path of an `.onnx` file.

    Raises CaptureError that names the node for whatever graphopt cannot import.
    """
    model, folder = read_model(source, limits)
    opset = opset_of(model)
    refuse_unknown(model, opset)
    inputs, names = size_names(renamed(read_inputs(model.graph), dynamic_shapes or {}))
    if double := repeated([placeholder_name(item.name) for item in inputs]):
        raise CaptureError(f"two inputs of the ONNX model are called {double!r}; give them different names")
    examples = None if example_inputs is None else match_examples(example_inputs, [item.name for item in inputs])
    given = {} if examples is None else _given_sizes(inputs, names, examples)
    failures: list[CaptureError] = []
    for hints in hint_choices(names, given):
        try:
            with quiet():
                flat, symbols, fakes = _read_graph(model, folder, opset, inputs, hints)
            break
        except CaptureError as error:
            failures.append(error)
    else:
        raise failures[0]
    known = replace(_known(symbols, examples, dynamic_shapes, fakes), exits=exits_of(model))
    program = assemble(flat, known, name=name, limits=limits)
    return raise_least_sizes(raised(_with_examples(program, known, hints, limits)), {})


def _read_graph(
    model: Any, folder: Any, opset: int, inputs: Sequence[Input], hints: Mapping[str, int]
) -> tuple[Flat, Symbols, dict[str, torch.Tensor]]:
    symbols = make_symbols(hints)
    emitter = Emitter(symbols.mode)
    importer = Importer(emitter, opset, folder)
    fakes = {item.name: fake_input(item, symbols) for item in inputs}
    tensors = {name: emitter.placeholder(placeholder_name(name), fake) for name, fake in fakes.items()}
    importer.values.update(tensors)
    axes = {size: (item.name, axis) for item in reversed(inputs) for axis, size in enumerate(item.shape)}
    for size, value in symbols.values.items():
        name, axis = axes[size]
        emitter.name_size(value, tensors[name], axis)
    importer.initializers(model.graph)
    importer.nodes(model.graph)
    outputs = [value.name for value in model.graph.output]
    if double := repeated(outputs):
        raise CaptureError(f"two outputs of the ONNX model are called {double!r}; give them different names")
    if not outputs:
        raise CaptureError("the ONNX model has no outputs")
    output = emitter.graph.output(tuple(importer.result(name).node for name in outputs))
    output.meta["val"] = tuple(node.meta["val"] for node in output.all_input_nodes)
    remove_dead(emitter.graph)
    module = GraphModule(emitter.weights.root, emitter.graph, class_name="Model")
    return Flat(module, tuple(fakes), tuple(outputs), {}), symbols, fakes


def _known(
    symbols: Symbols,
    examples: Sequence[torch.Tensor] | None,
    dynamic_shapes: Mapping[str, Any] | None,
    fakes: Mapping[str, torch.Tensor],
) -> Known:
    environment = symbols.mode.shape_env
    assert environment is not None
    named = symbols.names
    sizes: dict[str, Any] = {}
    if dynamic_shapes:
        request = read_request(dynamic_shapes, fakes)
        # An expression has become the size itself when the inputs were read, where the file does not fix it.
        fixed = [axis for axis in request.axes if isinstance(fakes[axis.input].shape[axis.axis], int)]
        axes = tuple(axis for axis in request.axes if axis.size.isidentifier() or axis in fixed)
        asked, sizes = name_axes(replace(request, axes=axes), fakes, environment)
        named |= asked
    return Known(symbols=named, sizes=sizes, examples=examples)


def _given_sizes(inputs: Sequence[Input], names: Sequence[str], examples: Sequence[torch.Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for item, example in zip(inputs, examples, strict=True):
        if example.ndim == len(item.shape):
            found |= {str(size): n for size, n in zip(item.shape, example.shape, strict=True) if size in names}
    return found


def _with_examples(program: Program, known: Known, hints: Mapping[str, int], limits: Limits) -> Program:
    if known.examples is not None:
        try:
            program.bind(known.examples)
        except FeedError as error:
            raise CaptureError(f"example_inputs do not fit the model: {error}") from error
        return replace(program, examples=tuple(known.examples))
    sizes = {}
    for symbol, name in program.symbols.items():
        bounds = program.sizes[name]
        size = max(hints.get(known.symbols.get(symbol, ""), hints.get(name, 4)), bounds.low)
        sizes[name] = size if bounds.high is None else min(size, bounds.high)
    refuse_large_inputs(program, sizes, limits)
    return replace(program, examples=draw_inputs(program, sizes, seed=0))
