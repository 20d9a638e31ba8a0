"""Why a pass changed a node, or left it alone: answers out of the JSON of a report, without the model.

A node is followed from pass to pass: where it was rewritten, what stands in its place is looked at from there on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graphopt.errors import UnknownNameError, UsageError

Outcome = Literal["applied", "declined", "near miss", "rolled back", "slower", "untouched", "removed", "gone"]
OUTCOMES: tuple[Outcome, ...] = ("applied", "declined", "near miss", "rolled back", "slower")
NUMBERED = re.compile(r"_\d+\b")  # makes relu_3 and relu one word
NUMBER = re.compile(r"\d[\d.]*(e[-+]?\d+)?")
SHOWN = 4  # names in a sentence; the rest is counted
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one pass did at one node: `outcome` in a word, `sentence` with the reason.

    `position` counts the passes of `entry` from 1; `rule` is empty where no rule looked at the node.
    """

    entry: str
    position: int
    pass_name: str
    node: str
    outcome: Outcome
    rule: str
    sentence: str


@dataclass(frozen=True)
class Group:
    """Answers of one rule whose sentences differ in names and numbers only; `example` is the first."""

    count: int
    example: Answer


@dataclass(frozen=True)
class Account:
    """One entry of a report: its passes in order, and the operator of every node that is known by name."""

    entry: str
    passes: tuple[Json, ...]
    operators: Mapping[str, str]
    first: frozenset[str]

    def describe(self, node: str) -> str:
        """ "relu_3 (aten.relu.default)" """
        operator = self.operators.get(node)
        return f"{node} ({operator})" if operator else node


def explain(report: Json, node: str | None = None, pass_: str | None = None) -> list[Answer]:
    """What the passes did, at every node that they recorded or what became of one `node`, all or one of them.

    `report` is what `graphopt optimize --json` wrote, or the report.json of an artifact. Raises UsageError for other
    JSON, UnknownNameError for a pass or node that the report does not have.
    """
    try:
        accounts = _accounts(report)
        names = {record["name"] for account in accounts for record in account.passes}
        if pass_ is not None and pass_ not in names:
            raise UnknownNameError("pass of this report", pass_, names)
        if node is None:
            found = [answer for account in accounts for answer in _everything(account)]
        else:
            known = [account for account in accounts if node in _names(account)]
            if not known:
                raise _unknown_node(node, accounts)
            found = [answer for account in known for answer in _follow(account, node)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"this is no report of graphopt ({type(error).__name__}: {error}); "
            "give what `graphopt optimize --json FILE` wrote, an artifact, or report.to_json()"
        ) from error
    return [answer for answer in found if pass_ in (None, answer.pass_name)]


def group(answers: Iterable[Answer]) -> list[Group]:
    """Alike answers together, in the order of the passes, most frequent first."""
    found: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        kind = answer.sentence if answer.outcome != "applied" else ""
        masked = NUMBER.sub("#", NUMBERED.sub("", kind))
        key = answer.entry, answer.position, answer.outcome, answer.rule, masked
        found.setdefault(key, []).append(answer)
    groups = [Group(len(alike), alike[0]) for alike in found.values()]
    return sorted(groups, key=lambda item: (item.example.entry, item.example.position, -item.count))


def _accounts(report: Json) -> list[Account]:
    if not str(report.get("format", "")).startswith("1."):
        raise UsageError(f"the report has format {report.get('format')!r}, not 1.x; write it anew with this version")
    if "entries" in report:
        entries = report["entries"].items()
        return [_account(name, item["passes"], {}) for name, item in entries]
    return [_account("", report["passes"], report["nodes"])]


def _account(entry: str, passes: Sequence[Json], nodes: Mapping[str, str]) -> Account:
    """The first record of each run of `optimize` has the nodes that the program came with."""
    operators = dict(nodes)
    first = frozenset(nodes or (passes[0]["nodes"] if passes else ()))
    for record in passes:
        operators |= {**record.get("nodes", {}), **record["created"]}
    return Account(entry, tuple(passes), operators, first)


def _names(account: Account) -> dict[str, None]:
    names = dict.fromkeys(account.operators)
    for answer in _everything(account):
        names[answer.node] = None
    for record in account.passes:
        for rewrite in record["rewrites"]:
            names |= dict.fromkeys((*rewrite["before"], *rewrite["after"]))
    return names


def _unknown_node(node: str, accounts: Sequence[Account]) -> UsageError:
    names = sorted({name for account in accounts for name in _names(account)})
    close = difflib.get_close_matches(node, names, n=3, cutoff=0.4) or [name for name in names if node in name]
    hint = f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else f"there are {_listed(names)}"
    return UsageError(f"the report has no node {node!r}; {hint}")


def _listed(names: Sequence[str], shown: int = SHOWN) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _everything(account: Account) -> Iterator[Answer]:
    """What the passes recorded, in order."""
    for position, record in enumerate(account.passes, 1):
        for rewrite in record["rewrites"]:
            node = rewrite["id"].removeprefix(f"{rewrite['rule']}@")
            yield _applied(account, position, record, rewrite, node)
        yield from _left_alone(account, position, record)


def _left_alone(account: Account, position: int, record: Json) -> Iterator[Answer]:
    def answer(outcome: Outcome, item: Json, node: str, sentence: str) -> Answer:
        return Answer(account.entry, position, record["name"], node, outcome, item["rule"], sentence)

    for item in record["declined"]:
        yield answer("declined", item, item["node"], item["reason"])
    for item in record["near_misses"]:
        found = f"{item['matched']} of {item['total']} parts of the pattern are there: {item['reason']}"
        yield answer("near miss", item, item["node"], found)
    for item in record["rolled_back"]:
        alone = "wrong on its own" if item["local"] else "right on its own, wrong with what is around it"
        yield answer("rolled back", item, item["node"], f"{alone}: {item['reason']}")
    for item in record.get("slower", ()):
        times = _times(item)
        together = len(item["ids"]) - 1
        also = f" (with {together} others of its rule)" if together else ""
        for identity in item["ids"]:
            node = identity.removeprefix(f"{item['rule']}@")
            yield answer("slower", item, node, f"right, but not measured to be faster{times}{also}")


def _times(item: Json) -> str:
    """ ": 2.1 ms a run with it, 2 ms without", and nothing in an artifact, which keeps no times."""
    if "seconds_with" not in item:
        return ""
    times = f": {_time(item['seconds_with'])} a run with it, {_time(item['seconds_without'])} without"
    less = item["seconds_with"] < item["seconds_without"]
    return times + (", and not less in three of four turns" if less else "")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _applied(account: Account, position: int, record: Json, rewrite: Json, node: str) -> Answer:
    """The values that a rewrite took out and those that it put there; constants are left out where there are calls."""
    new = [name for name in rewrite["after"] if name in record["created"]]
    before, after = (
        _listed([account.describe(name) for name in names]) for names in (rewrite["before"], new or rewrite["after"])
    )
    made = f"became {after}" if new else f"gave way to {after}" if after else "was taken out: nothing reads it"
    error = record.get("errors", {}).get(rewrite["id"])
    sentence = f"{before} {made}" + (f"; error {error:.2g}" if error else "")
    return Answer(account.entry, position, record["name"], node, "applied", rewrite["rule"], sentence)


def _follow(account: Account, node: str) -> Iterator[Answer]:
    """What each pass did at `node`, or at what stands in its place by then."""
    here = [node] if node in account.first else []
    gone = ""
    for position, record in enumerate(account.passes, 1):
        if node in record.get("nodes", ()) and not here:
            here = [node]
        answers, here = _pass_on(account, position, record, node, here)
        if not answers and here:
            answers = [_silent(account, position, record, here)]
        elif not answers and gone:
            sentence = f"it had been removed by {gone}"
            answers = [Answer(account.entry, position, record["name"], node, "gone", "", sentence)]
        elif answers and not here:
            gone = record["name"]
        yield from answers


def _pass_on(
    account: Account, position: int, record: Json, node: str, here: Sequence[str]
) -> tuple[list[Answer], list[str]]:
    """The answers of one pass for the nodes that are `here`, and those that are there after it."""
    now = dict.fromkeys(here)
    answers = list(_taken_back_around(account, position, record, now))
    answers += [item for item in _left_alone(account, position, record) if item.node in now]
    for rewrite in record["rewrites"]:
        hit = [name for name in rewrite["before"] if name in now]
        if hit:
            answers.append(_applied(account, position, record, rewrite, hit[0]))
            for name in hit:
                del now[name]
            now |= dict.fromkeys(name for name in rewrite["after"] if name in account.operators)
        elif node in rewrite["after"] or now.keys() & set(rewrite["after"]):
            place = node if node in rewrite["after"] else next(name for name in rewrite["after"] if name in now)
            answers.append(_applied(account, position, record, rewrite, place))
            now |= dict.fromkeys([place] if place in account.operators else [])
    for name in [name for name in now if name in record.get("removed", ())]:
        del now[name]
        if not any(item.outcome == "applied" for item in answers):
            sentence = "nothing reads it any more after the rewrites of this pass"
            answers.append(Answer(account.entry, position, record["name"], name, "removed", "", sentence))
    return [replace(item, sentence=_through(node, item)) for item in answers], list(now)


def _taken_back_around(account: Account, position: int, record: Json, now: Mapping[str, None]) -> Iterator[Answer]:
    """Rewrites taken back that would have taken out one of the nodes, and are recorded at another."""
    for item in record["rolled_back"]:
        inside = [name for name in item["before"] if name in now]
        if inside and item["node"] not in now:
            sentence = f"with {item['node']}, which was wrong: {item['reason']}"
            yield Answer(account.entry, position, record["name"], inside[0], "rolled back", item["rule"], sentence)


def _through(node: str, answer: Answer) -> str:
    """The sentence, with the node that stands for `node` where it is another one."""
    known = answer.node == node or answer.outcome == "applied"
    return answer.sentence if known else f"at {answer.node}: {answer.sentence}"


def _silent(account: Account, position: int, record: Json, here: Sequence[str]) -> Answer:
    """The answer of a pass that recorded nothing."""
    starts, name = record["starts_at"], record["name"]
    found = _listed([account.describe(item) for item in here])
    verb = "is" if len(here) == 1 else "are"
    if starts and not any(account.operators.get(item) in starts for item in here):
        places = f"{name} starts at {_listed(starts)}"
        operators = list(dict.fromkeys(account.operators.get(item, "unknown") for item in here))
        sentence = f"{places}; {here[0]} is {operators[0]}" if len(here) == 1 else f"{places}; there {verb} {found}"
    else:
        meaning = record.get("unrecorded", "")
        sentence = f"{name} recorded nothing at {found}" + (f": {meaning}" if meaning else "")
    return Answer(account.entry, position, name, here[0], "untouched", "", sentence)
