"""What is compiled must compute what the program computes: checked before anything is saved.

A session runs beside PyTorch on the examples and on inputs drawn from each input's domain, at the example's sizes, at 1
and at primes; a program with state is followed for some calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.arrays import array_of, tensor_of
from graphopt.checking.branches import search_branches
from graphopt.checking.close_decisions import MARGIN, close_samples
from graphopt.checking.close_rounding import shifted_runs
from graphopt.checking.reference import largest_error, magnitude, run_float64
from graphopt.checking.samples import Drawn, draw_samples, from_state
from graphopt.errors import VerificationError
from graphopt.program import Program, TensorSpec
from graphopt.runtime.session import InferenceSession

# A compiled program may be this much farther from float64 than PyTorch is, plus a share of the largest value: its
# polynomials and the order of its sums are its own.
_FACTOR = 16.0
_SHARE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_FLIPS = 4.0  # times what is worth a rounding of codes that is close to a half, see `close_rounding`
_STEPS = 2  # calls that a program with state is followed for
FAULT = "this is a fault of graphopt's lowering, please report it"


@dataclass(frozen=True)
class Check:
    """What came of one entry: the largest error relative to the largest value, and what could not be checked."""

    error: float
    unchecked: tuple[str, ...] = ()


def check_session(session: InferenceSession, entries: Mapping[str, Program]) -> dict[str, Check]:
    """What came of every entry. Raises VerificationError naming entry, output and sizes."""
    checks = {}
    for name, program in entries.items():
        worst, close = 0.0, 0
        cases, unchecked = check_cases(program)
        for case in cases:
            session.reset()
            state = tuple(item.initial for item in program.state)
            for _ in range(_STEPS if state else 1):
                feed = {spec.name: array_of(value) for spec, value in zip(program.inputs, case.inputs, strict=True)}
                arrays = session.run([spec.name for spec in program.outputs], feed, entry=name)
                results = [tensor_of(each, spec.dtype) for each, spec in zip(arrays, program.outputs, strict=True)]
                outputs, following = program.step(case.inputs, state)
                exact = run_float64(from_state(program, state), case.inputs)
                others = shifted_runs(program, (*case.inputs, *state))
                if program.exits is not None:  # a sample that may leave either way is compared with neither
                    clear = ~close_samples(program, case.inputs)
                    close += int((~clear).sum())
                    results = [value[clear] for value in results]
                    outputs, exact = (tuple(value[clear] for value in values) for values in (outputs, exact))
                    others = [tuple(value[clear] for value in values) for values in others]
                for n, (spec, result, eager, reference) in enumerate(
                    zip(program.outputs, results, outputs, exact, strict=False)
                ):
                    flips = _FLIPS * max((largest_error(other[n], eager) for other in others), default=0.0)
                    worst = max(worst, _compare(name, spec, case.sizes, result, eager, reference, flips))
                state = following
        if close:
            unchecked.append(f"not checked: {close} samples whose confidence is within {MARGIN:g} of a threshold")
        checks[name] = Check(worst, tuple(unchecked))
    return checks


def check_cases(program: Program) -> tuple[list[Drawn], list[str]]:
    """The examples, drawn inputs, and inputs for branches that those leave out; and what PyTorch cannot run."""
    drawn, skipped = draw_samples(program, seed=0)
    cases = [Drawn(program.bind(program.examples), program.examples), *drawn]
    branches, missing = search_branches(program, [case.inputs for case in cases])
    return [*cases, *branches], [*skipped, *missing]


def _compare(
    entry: str,
    spec: TensorSpec,
    sizes: Mapping[str, int],
    result: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    flips: float,
) -> float:
    given = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed sizes"
    where = f"output {spec.name!r} of entry {entry!r} at {given}"
    if result.shape != eager.shape or result.dtype != eager.dtype:
        raise VerificationError(
            f"{where} is {result.dtype} {list(result.shape)} where PyTorch gives {eager.dtype} {list(eager.shape)}; "
            f"{FAULT}"
        )
    reference = reference if eager.is_floating_point() else eager
    error, scale = largest_error(result, reference), magnitude(reference)
    allowed = allowed_error(eager, reference) + flips
    if not error <= allowed:
        raise VerificationError(
            f"{where} is off by {error:.3g} where {allowed:.3g} is allowed, so nothing is saved; {FAULT}"
        )
    return error / scale if scale else error


def allowed_error(eager: torch.Tensor, reference: torch.Tensor) -> float:
    """How far a compiled result may be from `reference`, where PyTorch gives `eager`."""
    return _FACTOR * largest_error(eager, reference) + _SHARE.get(eager.dtype, 0.0) * magnitude(reference)
