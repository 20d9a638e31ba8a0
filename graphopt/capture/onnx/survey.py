"""Everything in an ONNX model that cannot be imported, not only the first: for `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from graphopt.capture.domains import infer_domains
from graphopt.capture.onnx.binding import Binding, ReadAgain, bound_input
from graphopt.capture.onnx.control_flow import BranchEmitter
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.external_data import ExternalData
from graphopt.capture.onnx.form import MOST_READINGS, Form, first_form
from graphopt.capture.onnx.graphs import all_graphs, operator_name
from graphopt.capture.onnx.importer import Importer, Steps, is_imported
from graphopt.capture.onnx.ledger import FixedSize, Ledger
from graphopt.capture.onnx.reading import opset_of
from graphopt.capture.onnx.sizes import (
    Symbols,
    fake_input,
    free_sizes,
    hint_choices,
    make_symbols,
    read_input,
    size_names,
)
from graphopt.capture.onnx.values import Tensor
from graphopt.capture.quiet import quiet
from graphopt.errors import CaptureError, FeedError
from graphopt.program import Domain, placeholder_name
from graphopt.untrusted.limits import Limits


@dataclass(frozen=True)
class Problem:
    """`where` names a node, tensor or input ("" for the model), `sentence` says what is wrong with it."""

    where: str
    sentence: str


@dataclass(frozen=True)
class Survey:
    """`unseen` nodes read what could not be imported, and were not looked at; `domains` has the inputs by name."""

    problems: tuple[Problem, ...]
    unseen: int
    domains: Mapping[str, Domain]


def survey(model: Any, folder: Path | None, limits: Limits) -> Survey:
    """Import what can be, at the sizes with the fewest problems. `model` is as `read_model` gave it."""
    problems: list[Problem] = []
    try:
        opset = opset_of(model)
    except CaptureError as error:
        return Survey((Problem("", str(error)),), 0, {})
    held, inputs = {proto.name for proto in model.graph.initializer}, []
    for value in model.graph.input:
        try:
            if value.name not in held:
                inputs.append(read_input(value))
        except CaptureError as error:
            problems.append(Problem(f"input {value.name!r}", str(error)))
    try:
        form = first_form(model, size_names(inputs))
    except CaptureError as error:
        return Survey((*problems, Problem("", str(error))), 0, {})
    for _ in range(MOST_READINGS):
        try:
            best = _read(_File(model, folder, opset), form, limits)
        except ReadAgain as found:
            form = form.after(found, {})
            continue
        return Survey((*problems, *best.problems), best.unseen, best.domains)
    return Survey((*problems, Problem("", f"over {MOST_READINGS} sizes are fixed by its nodes")), 0, {})


@dataclass(frozen=True)
class _File:
    model: Any
    folder: Path | None
    opset: int


def _read(file: _File, form: Form, limits: Limits) -> Survey:
    """At the sizes with the fewest problems. Raises ReadAgain where numbers in the file fix sizes."""
    choices: list[tuple[Survey, ReadAgain | None]] = []
    for hints in hint_choices(free_sizes(form.inputs), {}):
        steps = Steps(limits)
        with quiet():
            choices.append(_attempt(file, form, hints, steps))
        if steps.too_many:  # whatever the sizes are
            break
    best, again = min(choices, key=lambda choice: len(choice[0].problems) + choice[0].unseen)
    if again is not None:
        raise again
    return best


def _attempt(file: _File, form: Form, hints: Mapping[str, int], steps: Steps) -> tuple[Survey, ReadAgain | None]:
    model, inputs, symbols = file.model, form.inputs, make_symbols(hints)
    emitter = Emitter(symbols.mode, Binding({placeholder_name(item.name): item for item in inputs}))
    external = ExternalData(file.folder, steps.limits)
    importer = _Surveyor(emitter, file.opset, external, steps, Ledger(symbols, {}))
    importer.notes = _Notes(symbols, _types(model), [], set())
    for item in inputs:
        try:
            value = emitter.placeholder(placeholder_name(item.name), fake_input(item, symbols))
        except CaptureError as error:
            importer.note(f"input {item.name!r}", error)
            continue
        bound = form.bound.get(item.name)
        importer.values[item.name] = value if bound is None else bound_input(emitter, bound)
        for axis, size in enumerate(item.shape):
            if size in symbols.values:
                emitter.name_size(symbols.values[str(size)], value, axis)
    known = [item.name for item in inputs if item.name in importer.values]
    importer.notes.lost |= {value.name for value in model.graph.input} - set(known)
    try:
        importer.initializers(model.graph)
        importer.nodes(model.graph)
    except CaptureError as error:
        importer.note("", error)
    emitter.graph.output(())
    domains = infer_domains(GraphModule(emitter.weights.root, emitter.graph))
    notes = importer.notes
    return Survey(tuple(notes.problems), notes.unseen, dict(zip(known, domains, strict=False))), notes.again


@dataclass
class _Notes:
    """Shared by the importers of all graphs: what went wrong, and the names that have no value for that reason."""

    symbols: Symbols
    types: Mapping[str, Any]
    problems: list[Problem]
    lost: set[str]
    unseen: int = 0
    again: ReadAgain | None = None  # the first sizes that numbers in the file fix


class _Surveyor(Importer):
    """Goes on after a node that cannot be imported, with the type that the file gives its results."""

    notes: _Notes

    def note(self, where: str, error: CaptureError) -> None:
        self.notes.problems.append(Problem(where, str(error)))

    def inside(self, emitter: Emitter) -> _Surveyor:
        inner = _Surveyor(emitter, self.opset, self.external, self.steps, self.ledger)
        inner.values, inner.notes = dict(self.values), self.notes
        return inner

    def initializer(self, graph: Any, proto: Any, roles: Any) -> None:
        try:
            super().initializer(graph, proto, roles)
        except CaptureError as error:
            self.note(f"tensor {proto.name!r}", error)
            self.notes.lost.add(proto.name)

    def node(self, node: Any, produced: set[str]) -> None:
        label = f"{operator_name(node)} {(node.name or next(iter(node.output), ''))!r}"
        before = len(self.notes.problems)
        try:
            if not is_imported(node, self.opset):
                raise CaptureError("the operator is not imported")
            if any(name in self.notes.lost for name in node.input):
                self.notes.unseen += 1
                self._go_on(node)
                return
            super().node(node, produced)
        except CaptureError as error:
            if self.steps.too_many:
                raise
            if isinstance(error, FixedSize) and self.notes.again is None:
                self.notes.again = error.again
            if len(self.notes.problems) == before:  # else it follows from one within its graphs
                self.note(label, error)
            self._go_on(node)

    def _go_on(self, node: Any) -> None:
        for name in node.output:
            value = self._declared(name) if name and name not in self.values else None
            if value is not None:
                self.values[name] = value
            elif name not in self.values:
                self.notes.lost.add(name)

    def _declared(self, name: str) -> Tensor | None:
        """A stand-in of the type that the file says; None in a branch, which has no inputs of its own."""
        declared = self.notes.types.get(name)
        if declared is None or isinstance(self.emitter, BranchEmitter):
            return None
        try:
            fake = fake_input(read_input(declared), self.notes.symbols)
        except (CaptureError, FeedError, SyntaxError):
            return None
        return self.emitter.placeholder(f"unknown_{len(self.emitter.graph.nodes)}", fake)


def _types(model: Any) -> dict[str, Any]:
    graphs = list(all_graphs(model.graph))
    return {value.name: value for graph in graphs for value in (*graph.value_info, *graph.output)}
