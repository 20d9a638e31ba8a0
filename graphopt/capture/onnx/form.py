"""How a graph is read: its inputs with their sizes, and the values of those that are bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphopt.capture.onnx.binding import ReadAgain
from graphopt.capture.onnx.metadata import BOUND, read_bound
from graphopt.capture.onnx.sizes import Input, with_sizes
from graphopt.capture.sidecar import bound_value
from graphopt.errors import CaptureError

MOST_READINGS = 100  # of one file


@dataclass(frozen=True)
class Form:
    """`warnings` are sentences on sizes that the file leaves open and that have a number here."""

    inputs: tuple[Input, ...]
    bound: Mapping[str, torch.Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def after(self, found: ReadAgain, examples: Mapping[str, torch.Tensor]) -> Form:
        """What reading in this form has found to be the next one."""
        bound = {name: examples[name] for name in sorted(found.inputs)}
        inputs = [_of_shape(item, bound[item.name]) if item.name in bound else item for item in self.inputs]
        numbers, reasons = dict(found.sizes), dict.fromkeys(found.sizes, found.why)
        for item in self.inputs:
            for size, number in zip(item.shape, bound[item.name].shape if item.name in bound else (), strict=False):
                if isinstance(size, str) and size.isidentifier():
                    numbers.setdefault(size, number)
                    reasons.setdefault(size, f"input {item.name!r}, which is bound to its example, has that size")
        warnings = [_warning(inputs, size, numbers[size], reason) for size, reason in reasons.items()]
        return Form(
            tuple(with_sizes(inputs, numbers)),
            {**self.bound, **bound},
            (*self.warnings, *(warning for warning in warnings if warning)),
        )


def first_form(model: Any, inputs: Sequence[Input]) -> Form:
    """That which the file declares. Raises CaptureError where it says of a bound input what cannot be."""
    bound, noted = {}, read_bound(model)
    for item in inputs:
        if item.name in noted:
            try:
                bound[item.name] = bound_value(noted[item.name], item.dtype, item.shape)
            except (TypeError, ValueError) as error:
                raise CaptureError(f"{BOUND} in the file's metadata is {error} for input {item.name!r}") from error
    return Form(tuple(inputs), bound)


def _of_shape(item: Input, example: torch.Tensor) -> Input:
    return replace(item, shape=tuple(example.shape))


def _warning(inputs: Sequence[Input], size: str, number: int, reason: str) -> str | None:
    """None where no input that is not bound has the size."""
    for item in inputs:
        if size in item.shape:
            place = f"axis {item.shape.index(size)} of input {item.name!r} ({size})"
            return (
                f"{place} is {number} and nothing else: {reason}; export the model without that number to keep it open"
            )
    return None
