"""Scan, written out: one copy of its body for each step of the sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphopt.capture.onnx.control_flow import MOST_TRIPS
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.values import Present, Tensor, Value
from graphopt.errors import CaptureError

if TYPE_CHECKING:
    from graphopt.capture.onnx.importer import Importer

aten = torch.ops.aten
_BATCHED = 9  # before this opset, the first axis of everything is that of samples


@dataclass(frozen=True)
class _Sides:
    """Axes and directions of the sequences that are read or written: 1 is backwards."""

    axes: Sequence[int]
    backwards: Sequence[int]


def scan(importer: Importer, op: Operation, inputs: list[Value]) -> tuple[Value, ...]:
    """Scan: states of the step before and elements of the sequences give new states and elements of the results.

    Raises CaptureError where the number of steps is a dynamic size.
    """
    body = op.attributes.graph("body")
    if body is None:
        raise CaptureError("a Scan needs a body; the file is damaged")
    read = op.attributes.integer("num_scan_inputs")
    batched = op.opset < _BATCHED
    if batched and inputs and inputs[0] is not None:
        raise op.refuse("sequence_lens of a Scan is not imported; give all sequences one length")
    given = [_present(value) for value in (inputs[1:] if batched else inputs)]
    states, sequences = given[: len(given) - read], given[len(given) - read :]
    written = len(body.output) - len(states)
    if not sequences or len(body.input) != len(given) or written < 0:
        raise CaptureError("the body of the Scan does not fit its inputs; the file is damaged")
    if not batched:
        sources = _sides(op, "input", read)
        return _scanned(importer, op, body, states, sequences, sources, _sides(op, "output", written))
    sources = _Sides([0] * read, op.attributes.integers("directions") or [0] * read)
    samples = []
    for sample in range(_length(sequences[0], 0, "samples")):
        rows = [op.call(aten.select.int, value, 0, sample) for value in (*states, *sequences)]
        parts = rows[: len(states)], rows[len(states) :]
        samples.append(_scanned(importer, op, body, *parts, sources, _Sides([0] * written, [0] * written)))
    return tuple(op.call(aten.stack.default, list(values)) for values in zip(*samples, strict=True))


def _present(value: Value) -> Present:
    if value is None:
        raise CaptureError("an input of the Scan is left out; the file is damaged")
    return value


def _sides(op: Operation, side: str, count: int) -> _Sides:
    axes, directions = (op.attributes.integers(f"scan_{side}_{what}") for what in ("axes", "directions"))
    return _Sides(axes or [0] * count, directions or [0] * count)


def _length(value: Present, axis: int, what: str) -> int:
    size = value.shape[axis]
    if not isinstance(size, int):
        raise CaptureError(f"the number of {what} of a Scan is the dynamic size {size}; give that axis a number")
    if not 0 < size <= MOST_TRIPS:
        raise CaptureError(f"a Scan of {size} {what} is not imported, only 1 to {MOST_TRIPS}; export the model to .pt2")
    return size


def _scanned(
    importer: Importer,
    op: Operation,
    body: Any,
    states: Sequence[Present],
    sequences: Sequence[Present],
    sources: _Sides,
    results: _Sides,
) -> tuple[Value, ...]:
    shared = importer.inside(importer.emitter)
    shared.initializers(body)
    axes = [op.axis(axis, value.ndim) for axis, value in zip(sources.axes, sequences, strict=True)]
    steps = _length(sequences[0], axes[0], "steps")
    collected: list[list[Tensor]] = [[] for _ in results.axes]
    current: list[Value] = list(states)
    for step in range(steps):
        importer.steps.count(trips=1)
        rows = [
            op.call(aten.select.int, value, axis, steps - 1 - step if backwards else step)
            for value, axis, backwards in zip(sequences, axes, sources.backwards, strict=True)
        ]
        inner = shared.inside(importer.emitter)
        inner.values |= dict(zip([value.name for value in body.input], [*current, *rows], strict=True))
        inner.nodes(body)
        made: list[Value] = [inner.result(value.name) for value in body.output]
        current = made[: len(states)]
        for kept, value in zip(collected, made[len(states) :], strict=True):
            kept.append(importer.emitter.tensor(_present(value)))
    stacked = [
        op.call(aten.stack.default, kept[::-1] if backwards else kept, op.axis(axis, kept[0].ndim + 1))
        for kept, axis, backwards in zip(collected, results.axes, results.backwards, strict=True)
    ]
    return (*current, *stacked)
