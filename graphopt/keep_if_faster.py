"""Rewrites stay only where the model is measured to be faster with them.

All rewrites of a pass are measured together; where that is not faster, those of each rule alone, and what remains once
more together. What is not faster is refused, and the pass runs again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from graphopt.checking.checked_run import Checked
from graphopt.program import Program
from graphopt.race import Outcome, Race
from graphopt.report import Slower


def keep_faster(
    checked: Checked, before: Program, run_without: Callable[[Collection[str]], Checked], race: Race
) -> tuple[Checked, tuple[Slower, ...]]:
    """What remains of `checked`, and what was taken back; `run_without` runs the pass without the given ids."""
    by_rule: dict[str, list[str]] = {}
    for rewrite in checked.result.rewrites:
        by_rule.setdefault(rewrite.rule, []).append(rewrite.id)
    if not by_rule:
        return checked, ()
    outcome = race(before, checked.result.program)
    if outcome.faster:
        return checked, ()
    if len(by_rule) == 1:
        return run_without(by_rule[next(iter(by_rule))]), _all_slower(by_rule, outcome)
    slower = _slower_rules(by_rule, before, run_without, race)
    if len(slower) < len(by_rule):
        rest = run_without([identity for item in slower for identity in item.ids])
        outcome = race(before, rest.result.program)
        if outcome.faster:
            return rest, slower
        known = {item.rule for item in slower}
        slower = (*slower, *_all_slower({rule: ids for rule, ids in by_rule.items() if rule not in known}, outcome))
    return run_without([identity for ids in by_rule.values() for identity in ids]), slower


def _slower_rules(
    by_rule: dict[str, list[str]], before: Program, run_without: Callable[[Collection[str]], Checked], race: Race
) -> tuple[Slower, ...]:
    found: list[Slower] = []
    for rule, ids in by_rule.items():
        others = [identity for other, identities in by_rule.items() if other != rule for identity in identities]
        outcome = race(before, run_without(others).result.program)
        if not outcome.faster:
            found.extend(_all_slower({rule: ids}, outcome))
    return tuple(found)


def _all_slower(by_rule: dict[str, list[str]], outcome: Outcome) -> tuple[Slower, ...]:
    seconds = outcome.first.seconds, outcome.second.seconds
    return tuple(Slower(tuple(ids), rule, *seconds) for rule, ids in by_rule.items())
