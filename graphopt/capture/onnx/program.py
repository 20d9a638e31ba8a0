"""From an ONNX model to a Program in normal form."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from graphopt.capture.asked_memory import refuse_large_inputs
from graphopt.capture.dynamic import Axis, Request, name_axes, read_request
from graphopt.capture.exported import Known, assemble, match_examples
from graphopt.capture.inputs import draw_inputs
from graphopt.capture.least_sizes import raise_least_sizes
from graphopt.capture.normal_form import Flat, remove_dead
from graphopt.capture.onnx.binding import Binding, ReadAgain, bound_input
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.external_data import ExternalData
from graphopt.capture.onnx.form import MOST_READINGS, Form, first_form
from graphopt.capture.onnx.importer import Importer, Steps, refuse_unknown, repeated
from graphopt.capture.onnx.ledger import FixedSize, Ledger
from graphopt.capture.onnx.metadata import exits_of, read_metadata
from graphopt.capture.onnx.reading import opset_of, read_model
from graphopt.capture.onnx.sizes import (
    Input,
    Symbols,
    fake_input,
    free_sizes,
    hint_choices,
    make_symbols,
    read_inputs,
    renamed,
    size_names,
    unnamed_sizes,
)
from graphopt.capture.quiet import quiet
from graphopt.capture.raising import raised
from graphopt.errors import CaptureError, CaptureWarning, FeedError
from graphopt.program import Program, SizeRange, placeholder_name
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

    Warns with CaptureWarning where nodes fix a size that the file or the caller leaves open, or make two of them one.
    Raises CaptureError that names the node for whatever graphopt cannot import.
    """
    file = _read_file(source, limits)
    inputs = size_names(renamed(read_inputs(file.model.graph), dynamic_shapes or {}))
    if double := repeated([placeholder_name(item.name) for item in inputs]):
        raise CaptureError(f"two inputs of the ONNX model are called {double!r}; give them different names")
    examples = None if example_inputs is None else _examples(inputs, example_inputs)
    reading, form = _read_until_it_holds(file, first_form(file.model, inputs), examples, limits)
    unnamed, equal = unnamed_sizes(inputs), reading.ledger.equal_sizes()
    said = (*form.warnings, *(text for text, names in equal.items() if unnamed.isdisjoint(names)))
    symbols, sizes = _named_sizes(reading, dynamic_shapes, inputs)
    given = None if examples is None else list(examples.values())
    notes = tuple(dict.fromkeys((*said, *equal, *reading.ledger.bounds())))
    known = Known(
        symbols=symbols,
        sizes=sizes,
        examples=given,
        metadata=read_metadata(file.model),
        bound=form.bound,
        notes=notes,
        exits=exits_of(file.model),
    )
    program = assemble(reading.flat, known, name=name, limits=limits)
    program = raise_least_sizes(raised(_with_examples(program, known, reading.hints, limits)), {})
    for text in said:
        warnings.warn(text, CaptureWarning, stacklevel=4)  # at the caller of `capture`
    return program


@dataclass(frozen=True)
class _File:
    model: Any
    folder: Path | None
    opset: int


@dataclass(frozen=True)
class _Reading:
    """A graph that was read in one form, with sizes of these values."""

    flat: Flat
    symbols: Symbols
    fakes: Mapping[str, torch.Tensor]
    hints: Mapping[str, int]
    ledger: Ledger


def _read_file(source: Any, limits: Limits) -> _File:
    model, folder = read_model(source, limits)
    opset = opset_of(model)
    refuse_unknown(model, opset)
    return _File(model, folder, opset)


def _examples(inputs: Sequence[Input], given: Any) -> dict[str, torch.Tensor]:
    """By input; sizes are checked when the program is there."""
    examples = match_examples(given, [item.name for item in inputs])
    for item, example in zip(inputs, examples, strict=True):
        if example.dtype != item.dtype or example.ndim != len(item.shape):
            raise CaptureError(
                f"example_inputs do not fit the model: input {item.name!r} must be {item.dtype} with "
                f"{len(item.shape)} axes, got {example.dtype} with {example.ndim}"
            )
    return {item.name: example for item, example in zip(inputs, examples, strict=True)}


def _read_until_it_holds(
    file: _File, form: Form, examples: Mapping[str, torch.Tensor] | None, limits: Limits
) -> tuple[_Reading, Form]:
    """Each reading that ends early has one input or size less that is open."""
    for _ in range(MOST_READINGS):
        try:
            with quiet():
                return _read(file, form, examples, limits), form
        except ReadAgain as found:
            form = form.after(found, examples or {})
    raise CaptureError(f"over {MOST_READINGS} sizes of the file are fixed by its nodes; give these axes numbers in it")


def _read(file: _File, form: Form, examples: Mapping[str, torch.Tensor] | None, limits: Limits) -> _Reading:
    """Read the graph with one choice of sizes after the other. Raises ReadAgain and CaptureError."""
    names = free_sizes(form.inputs)
    given = {} if examples is None else _given_sizes(form.inputs, names, examples)
    failures: list[CaptureError] = []
    for hints in hint_choices(names, given):
        steps = Steps(limits)
        try:
            return _read_graph(file, form, examples, hints, steps, Ledger(make_symbols(hints), given))
        except CaptureError as error:
            failures.append(error)
            if steps.too_many:  # whatever the sizes are
                raise
    for failure in failures:
        if isinstance(failure, FixedSize):
            raise failure.again from failure
    raise failures[0]


def _read_graph(
    file: _File,
    form: Form,
    examples: Mapping[str, torch.Tensor] | None,
    hints: Mapping[str, int],
    steps: Steps,
    ledger: Ledger,
) -> _Reading:
    graph, inputs, symbols = file.model.graph, form.inputs, ledger.symbols
    emitter = Emitter(symbols.mode, Binding({placeholder_name(item.name): item for item in inputs}, examples))
    importer = Importer(emitter, file.opset, ExternalData(file.folder, steps.limits), steps, ledger)
    fakes = {item.name: fake_input(item, symbols) for item in inputs}
    tensors = {
        item.name: replace(emitter.placeholder(placeholder_name(item.name), fakes[item.name]), narrow=item.narrow)
        for item in inputs
    }
    importer.values.update(tensors)
    for name, value in form.bound.items():
        importer.values[name] = bound_input(emitter, value)
    axes = {size: (item.name, axis) for item in reversed(inputs) for axis, size in enumerate(item.shape)}
    for size, number in symbols.values.items():
        name, axis = axes[size]
        emitter.name_size(number, tensors[name], axis)
    importer.initializers(graph)
    importer.nodes(graph)
    outputs = [value.name for value in graph.output]
    if double := repeated(outputs):
        raise CaptureError(f"two outputs of the ONNX model are called {double!r}; give them different names")
    if not outputs:
        raise CaptureError("the ONNX model has no outputs")
    output = emitter.graph.output(tuple(importer.result(name).node for name in outputs))
    output.meta["val"] = tuple(node.meta["val"] for node in output.all_input_nodes)
    remove_dead(emitter.graph)
    module = GraphModule(emitter.weights.root, emitter.graph, class_name="Model")
    return _Reading(Flat(module, tuple(fakes), tuple(outputs), {}), symbols, fakes, hints, ledger)


def _named_sizes(
    reading: _Reading, dynamic_shapes: Mapping[str, Any] | None, declared: Sequence[Input]
) -> tuple[dict[str, str], dict[str, SizeRange]]:
    """The names of symbols, and the bounds that the caller asks for."""
    environment = reading.symbols.mode.shape_env
    assert environment is not None
    named = reading.symbols.names
    if not dynamic_shapes:
        return named, {}
    request = read_request(dynamic_shapes, reading.fakes)
    shapes = {item.name: item.shape for item in declared}
    axes = []
    for axis in request.axes:
        if isinstance(reading.fakes[axis.input].shape[axis.axis], int):
            # One that the file declares is refused, one that its nodes have is warned of.
            asked = isinstance(shapes[axis.input][axis.axis], int)
            if not asked:
                _check_bounds(request, axis, int(reading.fakes[axis.input].shape[axis.axis]))
        else:  # an expression has become the size itself when the inputs were read
            asked = axis.size.isidentifier()
        axes += [axis] if asked else []
    symbols, sizes = name_axes(replace(request, axes=tuple(axes)), reading.fakes, environment)
    return named | symbols, sizes


def _check_bounds(request: Request, axis: Axis, size: int) -> None:
    low, high = request.low.get(axis.size), request.high.get(axis.size)
    if size < (size if low is None else low) or size > (size if high is None else high):
        raise CaptureError(f"{axis} can only be {size} in this model, which its Dim {axis.size!r} does not allow")


def _given_sizes(inputs: Sequence[Input], names: Sequence[str], examples: Mapping[str, torch.Tensor]) -> dict[str, int]:
    pairs = [pair for item in inputs for pair in zip(item.shape, examples[item.name].shape, strict=True)]
    return {str(size): number for size, number in pairs if size in names}


def _with_examples(program: Program, known: Known, hints: Mapping[str, int], limits: Limits) -> Program:
    if known.examples is not None:
        try:
            program.bind(known.examples)
        except FeedError as error:
            reasons = "".join(f"; {note}" for note in known.notes)
            raise CaptureError(f"example_inputs do not fit the model: {error}{reasons}") from error
        return replace(program, examples=tuple(known.examples))
    sizes = {}
    for symbol, name in program.symbols.items():
        bounds = program.sizes[name]
        size = max(hints.get(known.symbols.get(symbol, ""), hints.get(name, 4)), bounds.low)
        sizes[name] = size if bounds.high is None else min(size, bounds.high)
    refuse_large_inputs(program, sizes, limits)
    return replace(program, examples=draw_inputs(program, sizes, seed=0))
