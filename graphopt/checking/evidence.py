"""What a program makes of the samples that it is checked on, and the verdict on another program that should agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphopt.checking.branches import Sides, forced, side_choices
from graphopt.checking.exactness import Verdict, describe, judge
from graphopt.checking.reference import run_float64
from graphopt.checking.samples import draw_samples, failure, from_state, with_empty_masks
from graphopt.program import Program


@dataclass(frozen=True)
class Sample:
    """Inputs to compare on, and what a float64 run of the reference program gives for them.

    With `sides`, conditions take the sides chosen there in place of what their predicates say; `state` is what the call
    starts from, where that is not the initial one.
    """

    label: str
    inputs: tuple[torch.Tensor, ...]
    reference: tuple[torch.Tensor, ...]
    sides: Sides = ()
    state: tuple[torch.Tensor, ...] = ()


Results = tuple[tuple[torch.Tensor, ...], ...]  # by sample: outputs, then new state


@dataclass(frozen=True)
class Evidence:
    """The samples that a program is held against, and what it makes of them."""

    samples: tuple[Sample, ...] = ()
    results: Results = ()


def make_samples(
    program: Program, seed: int, given: Sequence[tuple[torch.Tensor, ...]] = ()
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The examples, `given` inputs, and inputs drawn from the domains at each set of sizes worth checking.

    Masks are also all zeros, a program with state is called a second time, and conditions go both ways.

    The second result says what PyTorch itself cannot run, and so is not checked.
    """
    if len(program.examples) != len(program.inputs):
        return (), ()
    drawn, skipped = draw_samples(program, seed)
    if drawn and (empty := with_empty_masks(program, drawn[0])):
        drawn.append(empty)
    found = [
        ("the example inputs", program.examples),
        *(("the first sample of the data", inputs) for inputs in given),
        *((item.label, item.inputs) for item in drawn),
    ]
    samples: list[Sample] = []
    for sides in ((), *side_choices(program)):
        changed = forced(program, sides) if sides else program
        label = " and ".join(str(side).lower() for side in sides)
        for place, inputs in found:
            where = f"{place} with conditions forced to {label}" if sides else place
            samples.extend(_calls(changed, where, inputs, sides))
    return tuple(samples), tuple(skipped)


def _calls(program: Program, label: str, inputs: tuple[torch.Tensor, ...], sides: Sides) -> Iterator[Sample]:
    """A first call with these inputs, and where there is state a second one; none where PyTorch cannot run it."""
    if failure(program, inputs):
        return
    yield Sample(label, inputs, run_float64(program, inputs), sides)
    if program.state:
        state = program.step(inputs)[1]
        second = from_state(program, state)
        if not failure(second, inputs):
            yield Sample(f"{label}, called again", inputs, run_float64(second, inputs), sides, state)


def prepare(program: Program, sample: Sample) -> Program:
    """The program as the sample wants it: its conditions forced, its state the one to start from."""
    program = forced(program, sample.sides) if sample.sides else program
    return from_state(program, sample.state) if sample.state else program


def results_of(program: Program, samples: tuple[Sample, ...]) -> Results:
    """Outputs, then new state, for every sample."""
    programs = {(): program, **{sides: forced(program, sides) for sides in {sample.sides for sample in samples} - {()}}}
    runs = (programs[sample.sides].step(sample.inputs, sample.state or None) for sample in samples)
    return tuple((*outputs, *state) for outputs, state in runs)


def check_exact(
    before: Results,
    after: Results,
    samples: tuple[Sample, ...],
    names: tuple[str, ...],
) -> Verdict:
    """The largest relative error of `after` against float64, or the first output and sample where it is not exact."""
    worst = 0.0
    for sample, old, new in zip(samples, before, after, strict=True):
        for name, left, right, reference in zip(names, old, new, sample.reference, strict=True):
            verdict = judge(left, right, reference)
            if verdict.reason is not None:
                return Verdict(verdict.error, f"{name} {verdict.reason}, on {sample.label}")
            worst = max(worst, verdict.error)
    return Verdict(worst)


def check_types(
    before: Results,
    after: Results,
    samples: tuple[Sample, ...],
    names: tuple[str, ...],
) -> Verdict:
    """The first output and sample where `after` has another type or shape; its values are free."""
    for sample, old, new in zip(samples, before, after, strict=True):
        for name, left, right in zip(names, old, new, strict=True):
            if (left.dtype, left.shape) != (right.dtype, right.shape):
                found = f"{name} is {describe(right)} instead of {describe(left)}"
                return Verdict(math.inf, f"{found}, on {sample.label}")
    return Verdict(math.nan)
