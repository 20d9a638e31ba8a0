"""Why a node changed or stayed, read from the JSON of a report: rewrites, and what was tried and left alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.errors import UsageError
from graphopt.explain import Answer, Outcome, explain

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One rewrite that was made and kept; `error` is relative, None where it was not measured on its own."""

    id: str
    rule: str
    pass_name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    error: float | None


@dataclass(frozen=True)
class Note:
    """A rule that could have changed a node and did not, or not for good; "removed": nothing read it any more."""

    kind: Outcome
    pass_name: str
    rule: str
    reason: str


@dataclass(frozen=True)
class PassSummary:
    """A pass as a row of a table; `trade_offs` are the settings that it measured, for a chart."""

    name: str
    rewrites: int
    declined: int
    rolled_back: int
    slower: int
    nodes_before: int
    nodes_after: int
    error: float | None
    seconds: float
    trade_offs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Account:
    """Numbers in `of_old` (nodes of A) and `of_new` (nodes made by a pass) are places in `changes`.

    `metric` is the name of what trade-offs give.
    """

    passes: tuple[PassSummary, ...] = ()
    changes: tuple[Change, ...] = ()
    of_old: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    of_new: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes_of_old: Mapping[str, tuple[Note, ...]] = field(default_factory=dict)
    notes_of_new: Mapping[str, tuple[Note, ...]] = field(default_factory=dict)
    metric: str = "metric"


def read_account(report: Report, names: Collection[str]) -> Account:
    """Follow nodes from pass to pass; `names` are those of the nodes of A. Raises UsageError for another JSON."""
    trail = _Trail(names)
    answers = [answer for answer in explain(report) if answer.outcome != "applied"]
    try:
        summaries = tuple(_summary(item) for item in report["passes"])
        for position, item in enumerate(report["passes"], 1):
            trail.follow(item, [answer for answer in answers if answer.position == position])
    except KeyError as e:
        raise UsageError(
            f"the report has no {e}; give what `graphopt optimize --json FILE` wrote, not the report of an artifact"
        ) from e
    metric = report.get("metric") or {}
    return replace(trail.account(summaries), metric=metric.get("name", "metric"))


class _Trail:
    """What is known after some passes: where each node that exists by now came from, and what made it."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.origins: dict[str, tuple[str, ...]] = {}
        self.changes: list[Change] = []
        self.of_old: dict[str, dict[int, None]] = {}
        self.of_new: dict[str, dict[int, None]] = {}
        self.notes_of_old: dict[str, dict[Note, None]] = {}
        self.notes_of_new: dict[str, dict[Note, None]] = {}

    def follow(self, item: Report, left_alone: Sequence[Answer]) -> None:
        for answer in left_alone:
            self._note(answer.node, Note(answer.outcome, item["name"], answer.rule, answer.sentence))
        created = item["created"]
        for rewrite in item["rewrites"]:
            self._rewrite(rewrite, item["name"], item["errors"].get(rewrite["id"]), created)
        for name in item["removed"]:
            if name not in self.of_old:
                reason = "nothing reads it any more after the rewrites of this pass"
                self._note(name, Note("removed", item["name"], item["name"], reason))

    def _note(self, name: str, note: Note) -> None:
        for origin in self.origins.get(name, (name,)):
            self.notes_of_old.setdefault(origin, {})[note] = None
        self.notes_of_new.setdefault(name, {})[note] = None

    def _rewrite(self, rewrite: Report, pass_name: str, error: float | None, created: Collection[str]) -> None:
        before, after = tuple(rewrite["before"]), tuple(rewrite["after"])
        number = len(self.changes)
        self.changes.append(Change(rewrite["id"], rewrite["rule"], pass_name, before, after, error))
        origins = dict.fromkeys(origin for name in before for origin in self.origins.get(name, (name,)))
        earlier = {known: None for name in before for known in self.of_new.get(name, ())}
        for origin in origins:
            self.of_old.setdefault(origin, {})[number] = None
        for name in after:
            if name in created or (name not in self.names and name not in self.of_new):
                self.origins[name] = tuple(origins)
                self.of_new[name] = {**earlier, number: None}

    def account(self, passes: tuple[PassSummary, ...]) -> Account:
        return Account(
            passes,
            tuple(self.changes),
            {name: tuple(found) for name, found in self.of_old.items()},
            {name: tuple(found) for name, found in self.of_new.items()},
            {name: tuple(found) for name, found in self.notes_of_old.items()},
            {name: tuple(found) for name, found in self.notes_of_new.items()},
        )


def _summary(item: Report) -> PassSummary:
    return PassSummary(
        item["name"],
        len(item["rewrites"]),
        len(item["declined"]),
        len(item["rolled_back"]),
        sum(len(found["ids"]) for found in item["slower"]),
        item["nodes_before"],
        item["nodes_after"],
        item["error"],
        item["seconds"],
        tuple(item["trade_offs"]),
    )
