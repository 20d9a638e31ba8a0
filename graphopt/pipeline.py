"""The passes of one `optimize` call, one after another: each checked, measured and accounted for."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from graphopt.checking.checked_run import Checked, Checker
from graphopt.contract import Pass, PassContext
from graphopt.data.metric import measure
from graphopt.keep_if_faster import keep_faster
from graphopt.matcher import operator_name
from graphopt.program import Program
from graphopt.race import Race
from graphopt.report import MetricReport, PassReport, Report, Slower, count, created, operators
from graphopt.spec_string import pass_options


@dataclass(frozen=True)
class Pipeline:
    """What to run and how to hold it to account; `race` is None where speed is not asked for."""

    passes: tuple[Pass, ...]
    context: PassContext
    verify: str
    strict: bool
    race: Race | None = None

    def run(self, first: Program) -> tuple[Program, Report]:
        """The program after all passes, and the account of them. Raises what `Checker.run` does."""
        data = self.context.data
        samples = () if data is None else (next(iter(data.fit)).inputs,)
        checker = Checker(self.verify, self.context.seed, self.strict, samples)
        metric_before = self._measure(first, first)
        program, reports = first, []
        for index, item in enumerate(self.passes):
            self.context.progress(item.name, index, len(self.passes))
            after = [previous.name for previous in self.passes[:index]]
            place = f"{item.name}, after {', '.join(after)}" if after else item.name
            program, step = self._step(checker, item, program, place)
            if item.preserves != "exact":
                step = replace(step, metric=self._measure(program, first))
            reports.append(step)
        metric_after = self._measure(program, first)
        report = Report(
            model=first.name,
            target=self.context.target,
            verify=self.verify,
            passes=tuple(reports),
            before=count(first),
            after=count(program),
            nodes=operators(first),
            checked_on=tuple(checker.labels),
            not_checked=tuple(checker.skipped),
            metric=self._describe(metric_before, metric_after),
            notes=(*first.notes, *(() if data is None else data.notes)),
        )
        if reports:
            program = replace(program, history=(*first.history, *report.records()))
        return program, report

    def _measure(self, program: Program, first: Program) -> float | None:
        metric, data = self.context.metric, self.context.data
        if metric is None or data is None:
            return None
        self.context.progress(f"measuring {metric.name}", 0, 1)
        return measure(program, data.held_out, metric, reference=first)

    def _describe(self, before: float | None, after: float | None) -> MetricReport | None:
        metric, data = self.context.metric, self.context.data
        if metric is None or data is None or before is None or after is None:
            return None
        return MetricReport(metric.name, before, after, len(data.held_out))

    def _step(self, checker: Checker, item: Pass, program: Program, place: str) -> tuple[Program, PassReport]:
        start = time.perf_counter()
        checked = checker.run(item, program, replace(self.context, race=self.race), place)
        slower: tuple[Slower, ...] = ()
        if self.race is not None and item.measured:
            self.context.progress(f"{item.name}: measuring", 0, 1)
            run_only = _Only(checker, item, program, self.context, place)
            checked, slower = keep_faster(checked, program, run_only, self.race)
        seconds = time.perf_counter() - start
        checker.accept(item, checked)
        result = checked.result
        return result.program, PassReport(
            name=item.name,
            options=pass_options(item),
            rewrites=result.rewrites,
            declined=result.declined,
            near_misses=result.near_misses,
            rolled_back=checked.rolled_back,
            slower=slower,
            notes=result.notes,
            before=count(program),
            after=count(result.program),
            created=created(program, result.program),
            removed=tuple(created(result.program, program)),
            starts_at=tuple(sorted(map(operator_name, item.starts_at()))),
            unrecorded=item.unrecorded,
            seconds=seconds,
            error=checked.error,
            errors=dict(checked.errors),
            trade_offs=result.trade_offs,
            regions=result.regions,
        )


@dataclass(frozen=True)
class _Only:
    """Runs one pass again with some of its rewrites, and none that it did not make before."""

    checker: Checker
    item: Pass
    program: Program
    context: PassContext
    place: str

    def __call__(self, ids: Collection[str]) -> Checked:
        refused: set[str] = set()

        def allow(identity: str) -> bool:
            if identity not in ids:
                refused.add(identity)
            return identity in ids and self.context.allow(identity)

        checked = self.checker.run(self.item, self.program, replace(self.context, allow=allow), self.place)
        declined = (item for item in checked.result.declined if f"{item.rule}@{item.node}" not in refused)
        return replace(checked, result=replace(checked.result, declined=tuple(declined)))
