"""The inputs that a program is checked on: its examples, and inputs drawn at each set of sizes worth checking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.program import Program

# What PyTorch raises where values or sizes do not fit together, and Python where the arithmetic on sizes does not.
CANNOT_RUN = (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class Drawn:
    """Inputs that PyTorch runs, and the value of every size that they have."""

    sizes: Mapping[str, int]
    inputs: tuple[torch.Tensor, ...]
    masks: str = ""  # what its masks are, where that is not drawn

    @property
    def label(self) -> str:
        details = [part for part in (named(self.sizes), self.masks) if part]
        return f"drawn inputs{' with ' + ' and '.join(details) if details else ''}"


def named(sizes: Mapping[str, int]) -> str:
    """ "batch=2, seq=7"."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def draw_samples(program: Program, seed: int) -> tuple[list[Drawn], list[str]]:
    """Inputs at each of `check_sizes`, and a sentence for each set of sizes at which PyTorch ran none.

    Integers without a domain may be positions along an axis that is smaller than in the examples: all 1, then all 0
    stand in where values within the examples' range do not run.
    """
    drawn, skipped = [], []
    for sizes in check_sizes(program):
        inputs, reason = _draw(program, sizes, seed)
        if inputs is None:
            skipped.append(f"not checked with {named(sizes) or 'drawn inputs'}: PyTorch cannot run it ({reason})")
        else:
            drawn.append(Drawn(sizes, inputs))
    return drawn, skipped


def with_empty_masks(program: Program, drawn: Drawn) -> Drawn | None:
    """The same inputs with masks of zeros only; None where there is no mask, or PyTorch cannot run it.

    An input counts as a mask by its domain, and without one where its example holds whole numbers from 0 to 1.
    """
    masks = [
        spec.name not in program.bound
        and (spec.domain.kind == "mask" or (spec.domain.kind == "any" and _holds_bits(example)))
        for spec, example in zip(program.inputs, program.examples, strict=True)
    ]
    inputs = tuple(
        torch.zeros_like(value) if is_mask else value for value, is_mask in zip(drawn.inputs, masks, strict=True)
    )
    return Drawn(drawn.sizes, inputs, "masks of zeros") if any(masks) and not failure(program, inputs) else None


def _holds_bits(example: torch.Tensor) -> bool:
    whole = not (example.is_floating_point() or example.is_complex())
    return whole and bool(((example == 0) | (example == 1)).all())


def from_state(program: Program, state: tuple[torch.Tensor, ...]) -> Program:
    """The program with another initial state."""
    items = tuple(replace(item, initial=value) for item, value in zip(program.state, state, strict=True))
    return replace(program, state=items)


def _draw(program: Program, sizes: Mapping[str, int], seed: int) -> tuple[tuple[torch.Tensor, ...] | None, str]:
    """Inputs that run, or None and why there are none."""
    try:
        first = draw_inputs(program, sizes, seed)
    except RuntimeError as error:  # an axis such as "past - 1" has no size here
        return None, first_line(error)
    reasons = []
    for inputs in _candidates(program, first):
        reasons.append(failure(program, inputs))
        if not reasons[-1]:
            return inputs, ""
    return None, reasons[0]


def failure(program: Program, inputs: tuple[torch.Tensor, ...]) -> str:
    """The first line of PyTorch's error for these inputs; empty where it runs them."""
    try:
        program.step(inputs)
    except CANNOT_RUN as error:
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """What PyTorch says first, without the trace that follows."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _candidates(program: Program, inputs: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    yield inputs
    free = [
        spec.domain.kind == "any"
        and spec.name not in program.bound
        and not (value.is_floating_point() or value.is_complex())
        for spec, value in zip(program.inputs, inputs, strict=True)
    ]
    if any(free):
        for number in (1, 0):
            yield tuple(
                torch.full_like(value, number) if replaced else value
                for value, replaced in zip(inputs, free, strict=True)
            )
