"""Rewrites stay only where the model is measured to be faster with them.

All rewrites of a pass are measured together; where that is not faster, those of each rule alone, and what remains once
more together. What is not faster is refused, and the pass runs again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from graphopt.checking.checked_run import Checked
from graphopt.program import Program
from graphopt.race import Outcome, Race
from graphopt.report import Slower


def keep_faster(
    checked: Checked, before: Program, run_only: Callable[[Collection[str]], Checked], race: Race
) -> tuple[Checked, tuple[Slower, ...]]:
    """What remains of `checked`, and what was taken back; `run_only` runs the pass with no rewrites but the given ids.

    What another rule would make of a place that is free again is not tried: it would have to be measured anew.
    """
    by_rule: dict[str, list[str]] = {}
    for rewrite in checked.result.rewrites:
        by_rule.setdefault(rewrite.rule, []).append(rewrite.id)
    if not by_rule:
        return checked, ()
    outcome = race(before, checked.result.program)
    if outcome.faster:
        return checked, ()
    if len(by_rule) == 1:
        return _remaining(checked, run_only(())), _all_slower(by_rule, outcome)
    slower = _slower_rules(by_rule, before, run_only, race)
    known = {item.rule for item in slower}
    others = {rule: ids for rule, ids in by_rule.items() if rule not in known}
    if others:
        rest = run_only([identity for ids in others.values() for identity in ids])
        outcome = race(before, rest.result.program)
        if outcome.faster:
            return _remaining(checked, rest), slower
        slower = (*slower, *_all_slower(others, outcome))
    return _remaining(checked, run_only(())), slower


def _slower_rules(
    by_rule: dict[str, list[str]], before: Program, run_only: Callable[[Collection[str]], Checked], race: Race
) -> tuple[Slower, ...]:
    found: list[Slower] = []
    for rule, ids in by_rule.items():
        outcome = race(before, run_only(ids).result.program)
        if not outcome.faster:
            found.extend(_all_slower({rule: ids}, outcome))
    return tuple(found)


def _remaining(checked: Checked, rest: Checked) -> Checked:
    """`rest` with what was found wrong before, too, which it never made."""
    return replace(rest, rolled_back=(*checked.rolled_back, *rest.rolled_back))


def _all_slower(by_rule: dict[str, list[str]], outcome: Outcome) -> tuple[Slower, ...]:
    seconds = outcome.first.seconds, outcome.second.seconds
    return tuple(Slower(tuple(ids), rule, *seconds) for rule, ids in by_rule.items())
