"""Run passes over a program, in order, each one checked before the next."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graphopt.checked_run import Checker
from graphopt.contract import Pass, PassContext
from graphopt.errors import UsageError
from graphopt.levels import LEVELS, level_passes
from graphopt.program import Program
from graphopt.registry import check_target
from graphopt.report import PassReport, Report, count, created, operators
from graphopt.spec_string import parse_spec, pass_options

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
    stays within 4 times the error against float64 that there was before it, plus 1e-6 relative: each rewrite on its
    own, then the whole program. Wrong rewrites, and only they, are taken back and reported; with `strict` they are an
    error. `data` and `metric` are for passes that preserve approximately; `seed` for them and for the inputs that are
    drawn to check.

    Raises UsageError for unusable arguments, PassError and its kinds where a pass fails, VerificationError where a
    result is wrong and leaving out rewrites does not make it right.
    """
    unused = {"keep_if_faster": keep_if_faster, "database": database, "threads": threads}
    for name, value in unused.items():
        if value:
            raise UsageError(f"{name}={value!r} has no effect in this version of graphopt; leave it out")
    chosen = choose_passes(passes)
    _check_arguments(program, chosen, verify, data, metric)
    check_target(target)
    context = PassContext(target=target, data=data, metric=metric, seed=seed)
    return _Run(program, chosen, context, Checker(verify, seed, strict)).run(verify)


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
    """One call of `optimize`: the program so far and the account of it."""

    def __init__(self, program: Program, passes: tuple[Pass, ...], context: PassContext, checker: Checker) -> None:
        self.first = program
        self.program = program
        self.passes = passes
        self.context = context
        self.checker = checker

    def run(self, verify: str) -> OptimizeResult:
        reports = []
        for index, item in enumerate(self.passes):
            self.context.progress(item.name, index, len(self.passes))
            after = [previous.name for previous in self.passes[:index]]
            reports.append(self._step(item, f"{item.name}, after {', '.join(after)}" if after else item.name))
        report = Report(
            model=self.first.name,
            target=self.context.target,
            verify=verify,
            passes=tuple(reports),
            before=count(self.first),
            after=count(self.program),
            nodes=operators(self.first),
            checked_on=tuple(self.checker.labels),
            not_checked=tuple(self.checker.skipped),
        )
        if reports:
            self.program = replace(self.program, history=(*self.first.history, *report.records()))
        return OptimizeResult(self.program, report)

    def _step(self, item: Pass, place: str) -> PassReport:
        start, before = time.perf_counter(), self.program
        checked = self.checker.run(item, before, self.context, place)
        seconds = time.perf_counter() - start
        self.checker.accept(item, checked)
        self.program = checked.result.program
        return PassReport(
            name=item.name,
            options=pass_options(item),
            rewrites=checked.result.rewrites,
            declined=checked.result.declined,
            near_misses=checked.result.near_misses,
            rolled_back=checked.rolled_back,
            slower=(),
            notes=checked.result.notes,
            before=count(before),
            after=count(self.program),
            created=created(before, self.program),
            starts_at=tuple(sorted(map(str, item.starts_at()))),
            seconds=seconds,
            error=checked.error,
            errors=dict(checked.errors),
        )
