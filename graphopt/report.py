"""The account of an `optimize` run: per pass what was rewritten, what was not and why. All of it is JSON.

`report.schema.json` beside this file describes the JSON and is checked against real reports by the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.analysis.storage import stored_weights
from graphopt.contract import Declined, NearMiss, Region, Rewrite, TradeOff
from graphopt.matcher import operator_name
from graphopt.program import Program, full_name

FORMAT = "1.0"


@dataclass(frozen=True)
class RolledBack:
    """A rewrite that was made, found wrong and taken back. `reason` says on which inputs and by how much.

    `local` tells whether it is wrong on its own, or only together with what is around it; `before` are the nodes that
    it took out.
    """

    id: str
    rule: str
    node: str
    reason: str
    local: bool
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slower:
    """Rewrites of one rule, right but taken back as the model is not faster with them. Median seconds of a run."""

    ids: tuple[str, ...]
    rule: str
    seconds_without: float
    seconds_with: float


@dataclass(frozen=True)
class Parameters:
    """Weights by unique storage: what several nodes read counts once."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """What a program consists of: calls by operator, and its weights."""

    operators: Mapping[str, int]
    parameters: Parameters

    @property
    def nodes(self) -> int:
        """Nodes that compute something."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class PassReport:
    """One pass.

    `error` is the largest error against float64 after it, relative to the largest value, and `errors` the same for each
    rewrite on its own by id; None and no entry where nothing was measured. `created` gives the operator of every node
    that the pass made, `removed` the names of those that it took away, `starts_at` the operators at which its rules
    look for a match (empty: at any), `unrecorded` what it means that nothing is said of a node, `trade_offs` the
    settings and `regions` the parts that the pass measured.
    """

    name: str
    options: dict[str, Any]
    rewrites: tuple[Rewrite, ...]
    declined: tuple[Declined, ...]
    near_misses: tuple[NearMiss, ...]
    rolled_back: tuple[RolledBack, ...]
    slower: tuple[Slower, ...]
    notes: tuple[str, ...]
    before: Counts
    after: Counts
    created: dict[str, str]
    starts_at: tuple[str, ...]
    seconds: float
    error: float | None
    errors: dict[str, float] = field(default_factory=dict)
    metric: float | None = None
    removed: tuple[str, ...] = ()
    unrecorded: str = ""
    trade_offs: tuple[TradeOff, ...] = ()
    regions: tuple[Region, ...] = ()

    @property
    def nodes_before(self) -> int:
        return self.before.nodes

    @property
    def nodes_after(self) -> int:
        return self.after.nodes

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; the node counts that people ask for first stand on top."""
        plain: dict[str, Any] = _plain(asdict(self))
        return {**plain, "nodes_before": self.nodes_before, "nodes_after": self.nodes_after}

    @staticmethod
    def summary(record: Mapping[str, Any]) -> dict[str, Any]:
        """The few numbers of a record that an artifact's manifest tells."""
        kept = {key: record.get(key) for key in ("name", "options", "nodes_before", "nodes_after", "error")}
        return {**kept, "rewrites": len(record.get("rewrites", ()))}

    def record(self) -> dict[str, Any]:
        """What stays with the program and its artifact: all but the clock, so that equal runs say the same."""
        kept = {key: value for key, value in self.to_json().items() if key != "seconds"}
        points = [{**item, "seconds": None} for item in kept["trade_offs"]]
        slower = [{"ids": list(item.ids), "rule": item.rule} for item in self.slower]
        regions = [{"nodes": list(item.nodes), "kept": item.kept} for item in self.regions]
        return {**kept, "slower": slower, "trade_offs": points, "regions": regions}


@dataclass(frozen=True)
class MetricReport:
    """A metric on the held-out data, before the first pass and after the last; higher is better."""

    name: str
    before: float
    after: float
    samples: int


@dataclass(frozen=True)
class Report:
    """All passes in order. `nodes` gives the operator of every node of the program as it came in."""

    model: str
    target: str
    verify: str
    passes: tuple[PassReport, ...]
    before: Counts
    after: Counts
    nodes: dict[str, str]
    checked_on: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()
    metric: MetricReport | None = None
    notes: tuple[str, ...] = ()
    format: str = FORMAT

    @property
    def nodes_before(self) -> int:
        return self.before.nodes

    @property
    def nodes_after(self) -> int:
        return self.after.nodes

    def records(self) -> list[dict[str, Any]]:
        """What stays with the program, a record a pass; the first also has the nodes that the program came with."""
        records = [item.record() for item in self.passes]
        return [{**item, "nodes": self.nodes} if index == 0 else item for index, item in enumerate(records)]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, as `report.schema.json` has it."""
        plain: dict[str, Any] = _plain(asdict(self))
        passes = [item.to_json() for item in self.passes]
        return {**plain, "passes": passes, "nodes_before": self.nodes_before, "nodes_after": self.nodes_after}


def count(program: Program) -> Counts:
    """Calls by operator in all graphs, and the weights."""
    operators = Counter(operator_name(node.target) for node in program.nodes() if node.op == "call_function")
    weights = stored_weights(program)
    parameters = Parameters(sum(item.elements for item in weights), sum(item.bytes for item in weights))
    return Counts(dict(sorted(operators.items())), parameters)


def operators(program: Program) -> dict[str, str]:
    """The operator of every call in all graphs by the name of its node, "true_graph_0.linear" in a sub-graph."""
    return {
        full_name(path, node.name): operator_name(node.target)
        for path, module in program.graphs()
        for node in module.graph.nodes
        if node.op == "call_function"
    }


def created(before: Program, after: Program) -> dict[str, str]:
    """The operator of every call that `before` does not have."""
    known = operators(before)
    return {name: operator for name, operator in operators(after).items() if name not in known}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
