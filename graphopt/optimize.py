"""Run passes over a program, in order, each one checked before the next."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from graphopt.branches import conditions
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.errors import (
    GraphoptError,
    PassError,
    PostconditionError,
    PreconditionError,
    UsageError,
    VerificationError,
)
from graphopt.levels import LEVELS, level_passes
from graphopt.program import Program
from graphopt.registry import check_target
from graphopt.report import PassReport, Report
from graphopt.samples import CANNOT_RUN
from graphopt.spec_string import parse_spec, pass_options
from graphopt.verify import Sample, check_exact, find_defect, make_samples, results_of

Verify = Literal["off", "structure", "numeric"]
_LEVEL_LIKE = re.compile(r"-?[Oo]?-?\d+|-?[Oo]\w?", re.ASCII)
VERIFY = ("off", "structure", "numeric")


@dataclass(frozen=True)
class OptimizeResult:
    """The optimized program and the account of how it came about."""

    program: Program
    report: Report


def optimize(
    program: Program,
    passes: str | Sequence[Pass],
    *,
    data: Any = None,
    metric: Any = None,
    verify: Verify = "numeric",
    keep_if_faster: bool = False,
    target: str = "cpu",
    database: Any = None,
    threads: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> OptimizeResult:
    """Run `passes` ("a{x=1},b", a list of passes, or "O0".."O3") over `program`, which stays as it is.

    `verify` checks after every pass: "structure" that the program is well-formed, "numeric" also that an exact pass
    stays within 4 times the error against float64 that there was before it, plus 1e-6 relative. `data` and `metric`
    are for passes that preserve approximately; `seed` for them and for the inputs that are drawn to check.

    Raises UsageError for unusable arguments, PassError and its kinds where a pass fails, VerificationError where a
    result is wrong.
    """
    unused = {"keep_if_faster": keep_if_faster, "database": database, "threads": threads, "strict": strict}
    for name, value in unused.items():
        if value:
            raise UsageError(f"{name}={value!r} has no effect in this version of graphopt; leave it out")
    chosen = choose_passes(passes)
    _check_arguments(program, chosen, verify, data, metric)
    check_target(target)
    context = PassContext(target=target, data=data, metric=metric, seed=seed)
    return _Run(program, chosen, context, verify).run()


def choose_passes(passes: str | Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes that this argument of `optimize` means. Raises UsageError and UnknownNameError."""
    if not isinstance(passes, str):
        for item in passes:
            if not isinstance(item, Pass):
                raise UsageError(f"passes holds {item!r}, which is no Pass; give instances, such as DeadCode()")
        return tuple(passes)
    if passes in LEVELS:
        return level_passes(passes)
    if _LEVEL_LIKE.fullmatch(passes):
        raise UsageError(f"unknown level {passes!r}; the levels are {', '.join(LEVELS)}")
    if passes.endswith((".yaml", ".yml")):
        raise UsageError(f"recipes such as {passes} come with a later version; write the passes as 'a{{x=1}},b'")
    return parse_spec(passes)


def _check_arguments(program: Program, passes: tuple[Pass, ...], verify: str, data: Any, metric: Any) -> None:
    if not isinstance(program, Program):
        raise UsageError(f"optimize takes a Program, got {type(program).__name__}; make one with graphopt.capture")
    if verify not in VERIFY:
        raise UsageError(f"verify={verify!r} is none of {', '.join(VERIFY)}")
    learning = [item.name for item in passes if item.preserves == "approximate"]
    if learning and (data is None or metric is None):
        raise UsageError(f"{learning[0]} changes results and needs both data and metric to say by how much; give both")
    for name, value in (("data", data), ("metric", metric)):
        if value is not None and not learning:
            raise UsageError(f"{name} has no effect: none of these passes is approximate; leave it out")
    if verify == "numeric" and passes and len(program.examples) != len(program.inputs):
        raise UsageError(
            f"{program.name} has no example inputs to check on; capture it with some or use verify='structure'"
        )


class _Run:
    """One call of `optimize`: the program so far, and what checking remembers from pass to pass."""

    def __init__(self, program: Program, passes: tuple[Pass, ...], context: PassContext, verify: str) -> None:
        self.first = program
        self.program = program
        self.passes = passes
        self.context = context
        self.verify = verify
        self.samples: tuple[Sample, ...] = ()
        self.results: tuple[tuple[torch.Tensor, ...], ...] = ()

    def run(self) -> OptimizeResult:
        reports = []
        for index, item in enumerate(self.passes):
            self.context.progress(item.name, index, len(self.passes))
            after = [previous.name for previous in self.passes[:index]]
            place = f"{item.name}, after {', '.join(after)}" if after else item.name
            reports.append(self._step(item, place))
        report = Report(tuple(reports), self.first.count_operators(), self.program.count_operators())
        if reports:
            history = (*self.first.history, *(item.summary() for item in reports))
            self.program = replace(self.program, history=history)
        return OptimizeResult(self.program, report)

    def _step(self, item: Pass, place: str) -> PassReport:
        start, before = time.perf_counter(), self.program
        reason = item.requires(before)
        if reason is not None:
            raise PreconditionError(f"pass {place}: cannot take the program: {reason}")
        result = self._call(item, place)
        seconds = time.perf_counter() - start
        self._check_structure(item, place, result.program)
        error = self._check_numbers(item, place, result.program)
        notes = result.notes if error is None else (*result.notes, *self.skipped)
        self.program = result.program
        counts = before.count_operators(), result.program.count_operators()
        options = pass_options(item)
        return PassReport(item.name, options, result.rewrites, result.declined, notes, *counts, seconds, error)

    def _call(self, item: Pass, place: str) -> PassResult:
        try:
            result = item.run(self.program, self.context)
        except GraphoptError:
            raise
        except Exception as error:
            raise PassError(f"pass {place}: {type(error).__name__}: {error}") from error
        if not isinstance(result, PassResult):
            raise PassError(f"pass {place}: run returned {type(result).__name__}; return a PassResult")
        return result

    def _check_structure(self, item: Pass, place: str, after: Program) -> None:
        if self.verify == "off":
            return
        defect = item.ensures(after)
        if defect is None and after is not self.program:
            defect = find_defect(self.program, after)
        if defect is not None:
            raise PostconditionError(f"pass {place}: the result is ill-formed: {defect}")

    def _check_numbers(self, item: Pass, place: str, after: Program) -> float | None:
        """The largest relative error against float64; a pass that is not exact starts a new reference."""
        if self.verify != "numeric" or after is self.program:
            return None
        if item.preserves != "exact":
            self.samples, self.results = (), ()
            return None
        if not self.samples:
            self.samples, self.skipped = make_samples(self.program, self.context.seed)
            self.results = results_of(self.program, self.samples)
        if conditions(after) != conditions(self.program):  # what would be forced is no longer the same in both
            kept = [pair for pair in zip(self.samples, self.results, strict=True) if not pair[0].sides]
            self.samples, self.results = tuple(s for s, _ in kept), tuple(r for _, r in kept)
        names = (*(spec.name for spec in after.outputs), *(state.spec.name for state in after.state))
        try:
            results = results_of(after, self.samples)
            error = check_exact(self.results, results, self.samples, names)
        except VerificationError as error:
            raise VerificationError(f"pass {place}: {error}") from error
        except CANNOT_RUN as error:
            raise VerificationError(f"pass {place}: the result does not run: {error}") from error
        self.results = results
        return error
