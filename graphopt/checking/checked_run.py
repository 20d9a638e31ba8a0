"""One pass after another over a program, each rewrite checked, and exactly the wrong ones taken back.

A pass runs; its result must be well-formed. Each of its rewrites is then checked on its own, and then the whole
program, on the same samples. What is wrong is refused and the pass runs again, until everything that is left is right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from graphopt.checking.bisection import find_wrong
from graphopt.checking.branches import conditions
from graphopt.checking.evidence import Evidence, check_exact, check_types, make_samples, results_of
from graphopt.checking.exactness import Verdict
from graphopt.checking.local_check import check_instances
from graphopt.checking.samples import CANNOT_RUN, first_line
from graphopt.checking.structure import find_defect
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.errors import GraphoptError, PassError, PostconditionError, PreconditionError, VerificationError
from graphopt.program import Program
from graphopt.report import RolledBack


@dataclass(frozen=True)
class Checked:
    """What is left of a pass: its result without the wrong rewrites, their account, and what was measured.

    `error` is that of the whole program, `errors` that of each rewrite by id, relative and against float64.
    """

    result: PassResult
    evidence: Evidence
    rolled_back: tuple[RolledBack, ...] = ()
    error: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)


class Checker:
    """Checks passes in a row over one program, and remembers the evidence from pass to pass.

    `given` are inputs to check on beside the examples and what is drawn. `labels` say what was checked on, `skipped`
    what could not be, in order and once each.
    """

    def __init__(self, verify: str, seed: int, strict: bool, given: tuple[tuple[torch.Tensor, ...], ...] = ()) -> None:
        self.verify = verify
        self.seed = seed
        self.strict = strict
        self.given = given
        self.evidence = Evidence()
        self.labels: dict[str, None] = {}
        self.skipped: dict[str, None] = {}

    def run(self, item: Pass, program: Program, context: PassContext, place: str) -> Checked:
        """Run one pass; `place` names it in errors, with those before it.

        Raises PreconditionError, PassError, PostconditionError, and VerificationError where the result is wrong
        without any rewrite, or with `strict` where any rewrite is.
        """
        reason = item.requires(program)
        if reason is not None:
            raise PreconditionError(f"pass {place}: cannot take the program: {reason}")
        if self.verify == "numeric" and not self.evidence.samples:
            samples, skipped = make_samples(program, self.seed, self.given)
            self.labels |= dict.fromkeys(sample.label for sample in samples)
            self.skipped |= dict.fromkeys(skipped)
            self.evidence = Evidence(samples, results_of(program, samples))
        refused: dict[str, RolledBack] = {}
        while True:
            attempt = _Attempt(self.evidence, item, program, context, place)
            result = attempt.run(self.verify, refused)
            if self.verify != "numeric" or result.program is program:
                return Checked(result, self.evidence, tuple(refused.values()))
            errors, wrong = attempt.check_rewrites(result)
            after, verdict = attempt.check_whole(result.program)
            if not wrong and verdict.reason is not None:
                wrong = attempt.search(result, refused, verdict.reason)
            if not wrong:
                error = None if math.isnan(verdict.error) else verdict.error
                return Checked(result, after, tuple(refused.values()), error, errors)
            if self.strict:
                first = wrong[0]
                raise VerificationError(
                    f"pass {place}: the rewrite {first.id} is wrong: {first.reason}; leave out strict to take it back"
                )
            refused.update((found.id, found) for found in wrong)

    def accept(self, item: Pass, checked: Checked) -> None:
        """Hold the next pass against this result; one that is not exact starts afresh."""
        changed = item.preserves != "exact" and bool(checked.result.rewrites)
        self.evidence = Evidence() if changed else checked.evidence


@dataclass(frozen=True)
class _Attempt:
    """One pass on one program, run as often as it takes."""

    evidence: Evidence
    item: Pass
    program: Program
    context: PassContext
    place: str

    def run(self, verify: str, refused: Collection[str], allowed: Collection[str] | None = None) -> PassResult:
        """Run the pass without the ids in `refused`, with only those in `allowed` where given.

        Raises PassError where it crashes, PostconditionError where the result or its account is ill-formed.
        """

        def allow(identity: str) -> bool:
            wanted = allowed is None or identity in allowed
            return wanted and identity not in refused and self.context.allow(identity)

        try:
            result = self.item.run(self.program, replace(self.context, allow=allow))
        except GraphoptError:
            raise
        except Exception as error:
            raise PassError(f"pass {self.place}: {type(error).__name__}: {error}") from error
        if not isinstance(result, PassResult):
            raise PassError(f"pass {self.place}: run returned {type(result).__name__}; return a PassResult")
        defect = _account_defect(self.program, result, refused)
        if defect is not None:
            raise PostconditionError(f"pass {self.place}: {defect}")
        if verify != "off":
            defect = self.item.ensures(result.program)
            if defect is None and result.program is not self.program:
                defect = find_defect(self.program, result.program)
            if defect is not None:
                raise PostconditionError(f"pass {self.place}: the result is ill-formed: {defect}")
        declined = tuple(item for item in result.declined if f"{item.rule}@{item.node}" not in refused)
        return replace(result, declined=declined)

    def check_rewrites(self, result: PassResult) -> tuple[dict[str, float], list[RolledBack]]:
        """The error of each rewrite on its own, and those that are wrong."""
        if self.item.preserves != "exact":
            return {}, []
        verdicts = check_instances(self.program, result.instances, self.evidence.samples)
        wrong = [
            _rolled_back(result, id, item.reason, True) for id, item in verdicts.items() if item.reason is not None
        ]
        return {id: verdict.error for id, verdict in verdicts.items()}, wrong

    def check_whole(self, after: Program) -> tuple[Evidence, Verdict]:
        """What `after` makes of the samples, and the verdict on it.

        A pass that is not exact only has to run, and to give results of the same types and shapes.
        """
        evidence = self.evidence
        if conditions(after) != conditions(self.program):  # what would be forced is no longer the same in both
            plain = [pair for pair in zip(evidence.samples, evidence.results, strict=True) if not pair[0].sides]
            evidence = Evidence(tuple(sample for sample, _ in plain), tuple(results for _, results in plain))
        names = (*(spec.name for spec in after.outputs), *(state.spec.name for state in after.state))
        try:
            results = results_of(after, evidence.samples)
        except CANNOT_RUN as error:
            return evidence, Verdict(math.inf, f"the result does not run: {first_line(error)}")
        check = check_exact if self.item.preserves == "exact" else check_types
        if after.exits != self.program.exits:  # it also tells which exits were taken, and has no state
            names = tuple(spec.name for spec in after.answers)
            results = tuple(values[: len(names)] for values in results)
        return Evidence(evidence.samples, results), check(evidence.results, results, evidence.samples, names)

    def search(self, result: PassResult, refused: Collection[str], reason: str) -> list[RolledBack]:
        """The rewrite without which, and without those after it, the program is right."""
        ids = [rewrite.id for rewrite in result.rewrites]

        def fails(allowed: Collection[str]) -> bool:
            attempt = self.run("structure", refused, set(allowed))
            return attempt.program is not self.program and self.check_whole(attempt.program)[1].reason is not None

        found = find_wrong(ids, fails) if ids else None
        if found is None:
            raise VerificationError(f"pass {self.place}: {reason}; no rewrite that it asked for makes the difference")
        return [_rolled_back(result, found, reason, False)]


def _account_defect(before: Program, result: PassResult, refused: Collection[str]) -> str | None:
    """What the account of rewrites has that no pass may say, or None."""
    ids = Counter(rewrite.id for rewrite in result.rewrites)
    if ids and result.program is before:
        return "it returned the program that it was given together with rewrites; edit a copy and return that"
    for identity, number in ids.items():
        if number > 1:
            return f"{number} rewrites have the id {identity}; give each its own"
        if identity in refused:
            return f"it made the rewrite {identity}, which was refused; ask context.allow before each rewrite"
    strange = next((instance.id for instance in result.instances if instance.id not in ids), None)
    return None if strange is None else f"its instance {strange} is none of its rewrites; give it the id of one"


def _rolled_back(result: PassResult, identity: str, reason: str | None, local: bool) -> RolledBack:
    rewrite = next(item for item in result.rewrites if item.id == identity)
    node = identity.removeprefix(f"{rewrite.rule}@")
    return RolledBack(identity, rewrite.rule, node, reason or "", local, rewrite.before)
