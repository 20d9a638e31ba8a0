"""Recurrent layers, each one operator of graphopt."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value
from graphopt.operators.recurrent import ACTIVATIONS, DIRECTIONS, USUAL

aten = torch.ops.aten
_NAMES = {name.lower(): name for name in ACTIVATIONS}
_NEEDS_NUMBERS = ("Affine", "ScaledTanh", "ThresholdedRelu")  # ONNX Runtime has other defaults than the standard


@operator("RNN", "GRU")
def rnn(op: Operation, x: Present, w: Present, r: Present, b: Value = None, lens: Value = None, h: Value = None) -> Any:
    options: dict[str, Any] = {}
    if op.attributes.integer("linear_before_reset"):
        options["linear_before_reset"] = True
    return _layer(op, op.name.lower(), [x, w, r, b, lens], [h], [], options)


@operator("LSTM")
def lstm(
    op: Operation, x: Present, w: Present, r: Present, b: Value = None, lens: Value = None, h: Value = None,
    c: Value = None, p: Value = None,
) -> Any:  # fmt: skip
    options: dict[str, Any] = {}
    if op.attributes.integer("input_forget"):
        options["input_forget"] = True
    return _layer(op, "lstm", [x, w, r, b, lens], [h, c], [p], options)


def _layer(
    op: Operation, kind: str, inputs: list[Value], states: list[Value], rest: list[Value], options: dict[str, Any]
) -> Any:
    direction = op.attributes.text("direction", "forward")
    if direction not in DIRECTIONS:
        raise op.refuse(f"direction {direction!r} is none of {', '.join(DIRECTIONS)}")
    if direction != "forward":
        options["direction"] = direction
    options |= _activations(op, kind, len(DIRECTIONS[direction]))
    if op.attributes.has("clip"):
        options["clip"] = op.attributes.number("clip", 0.0)
    given = [None if value is None else op.tensor(value) for value in (*inputs, *states, *rest)]
    hidden = op.attributes.integer("hidden_size")
    if hidden and given[2] is not None and hidden != given[2].shape[-1]:
        raise op.refuse(f"hidden_size is {hidden}, but R has {given[2].shape[-1]} columns")
    batch_first = bool(op.attributes.integer("layout"))
    if batch_first:
        turned = (0, *range(len(inputs), len(inputs) + len(states)))
        given = [_exchanged(op, value) if place in turned else value for place, value in enumerate(given)]
    while given[-1] is None:
        given.pop()
    y, *ends = op.parts(getattr(torch.ops.graphopt, kind).default, *given, **options)
    if not batch_first:
        return y, *ends
    return op.call(aten.permute.default, y, [2, 0, 1, 3]), *(_exchanged(op, end) for end in ends)


def _exchanged(op: Operation, value: Tensor | None) -> Any:
    """The value with batch and steps, or batch and directions, exchanged."""
    return None if value is None else op.call(aten.transpose.int, value, 0, 1)


def _activations(op: Operation, kind: str, directions: int) -> dict[str, Any]:
    """The activations of all directions with their numbers, of which the file lists only those that are used; none
    where they are the usual ones."""
    alpha, beta = (op.attributes.numbers(f"activation_{name}") or [] for name in ("alpha", "beta"))
    usual = USUAL[kind] * directions
    names = op.attributes.texts("activations")
    if names is not None and kind == "rnn":
        names = names[: len(usual)]  # the standard's default is two in any direction
    if names is None or [name.lower() for name in names] == [name.lower() for name in usual]:
        return {}
    found = []
    for name in names:
        if name.lower() not in _NAMES:
            raise op.refuse(f"activation {name!r} of {op.name} is not imported; those are {', '.join(ACTIVATIONS)}")
        found.append(_NAMES[name.lower()])
    return {
        "activations": found,
        "alpha": [_number(op, name, ACTIVATIONS[name].alpha, alpha) for name in found],
        "beta": [_number(op, name, ACTIVATIONS[name].beta, beta) for name in found],
    }


def _number(op: Operation, name: str, default: float | None, given: list[float]) -> float:
    """The next of the numbers given, for an activation that has one."""
    if default is None:
        return 0.0
    if name in _NEEDS_NUMBERS and not given:
        raise op.refuse(f"activation {name} has no alpha or beta, and runtimes take different ones; give them")
    return given.pop(0) if given else default
