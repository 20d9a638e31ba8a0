"""The inputs that a program is checked on: its examples, and inputs drawn at each set of sizes worth checking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.program import Program

CANNOT_RUN = (RuntimeError, IndexError)  # what PyTorch raises where values or sizes do not fit together


@dataclass(frozen=True)
class Drawn:
    """Inputs that PyTorch runs, and the value of every size that they have."""

    sizes: Mapping[str, int]
    inputs: tuple[torch.Tensor, ...]

    @property
    def label(self) -> str:
        return f"drawn inputs{' with ' + named(self.sizes) if self.sizes else ''}"


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


def _draw(program: Program, sizes: Mapping[str, int], seed: int) -> tuple[tuple[torch.Tensor, ...] | None, str]:
    """Inputs that run, or None and why there are none."""
    try:
        first = draw_inputs(program, sizes, seed)
    except RuntimeError as error:  # an axis such as "past - 1" has no size here
        return None, _first_line(error)
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
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _candidates(program: Program, inputs: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    yield inputs
    free = [
        spec.domain.kind == "any" and not (value.is_floating_point() or value.is_complex())
        for spec, value in zip(program.inputs, inputs, strict=True)
    ]
    if any(free):
        for number in (1, 0):
            yield tuple(
                torch.full_like(value, number) if replaced else value
                for value, replaced in zip(inputs, free, strict=True)
            )
