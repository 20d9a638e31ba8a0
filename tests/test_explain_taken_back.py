"""What `explain` says of rewrites that were taken back: wrong ones and slow ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import graphopt
from graphopt.report import Slower
from graphopt.rewrite import RewritePass, Rule
from tests.test_explain import at, program_of, report_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Doubled(Rule):
    """Wrong on purpose."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.relu.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.mul.Tensor(aten.relu.default(x), 2.0)


@dataclass(frozen=True)
class Doubling(RewritePass):
    name = "doubling"
    rules = (Doubled,)


@dataclass(frozen=True)
class Swapped(Rule):
    """Wrong on purpose: a difference the other way round."""

    @staticmethod
    def pattern(x: Any, y: Any) -> Any:
        return aten.sub.Tensor(aten.exp.default(x), y)

    @staticmethod
    def rewrite(x: Any, y: Any) -> Any:
        return aten.sub.Tensor(y, aten.exp.default(x))


@dataclass(frozen=True)
class WrongDifference(RewritePass):
    name = "wrong-difference"
    rules = (Swapped,)


def test_a_rewrite_that_was_taken_back_says_by_how_much_it_was_wrong() -> None:
    report = report_of(lambda model, x: x.relu(), Doubling())
    (answer,) = at(report, "relu")
    assert answer[0] == "rolled back" and answer[1].startswith("wrong on its own: ") and "off by" in answer[1]


def test_a_node_inside_a_rewrite_that_was_taken_back() -> None:
    report = report_of(lambda model, x: x.sin().exp() - model.weight, WrongDifference())
    assert report["passes"][0]["rolled_back"][0]["node"] == "sub"
    (answer,) = at(report, "exp")
    assert answer[0] == "rolled back" and answer[1].startswith("with sub, which was wrong: ")


def test_a_rewrite_that_was_slower_says_the_times() -> None:
    report = report_of(lambda model, x: x.relu(), Doubling(), verify="structure")
    record = report["passes"][0]
    record["slower"] = [{"ids": ["doubling/doubled@relu"], "rule": "doubling/doubled"}]
    record["slower"][0] |= {"seconds_with": 0.0021, "seconds_without": 0.002}
    record["rewrites"], record["created"], record["removed"] = [], {}, []
    assert at(report, "relu") == [
        ("slower", "right, but not measured to be faster: 2.1 ms a run with it, 2 ms without")
    ]


def test_a_rewrite_that_was_slower_is_known_without_times() -> None:
    result = graphopt.optimize(program_of(lambda model, x: x.relu()), [Doubling()], verify="structure")
    (item,) = result.report.passes
    slower = (Slower(("doubling/doubled@relu",), "doubling/doubled", 0.002, 0.0019),)
    taken_back = replace(item, rewrites=(), slower=slower, created={}, removed=())
    report = replace(result.report, passes=(taken_back,))
    times = "1.9 ms a run with it, 2 ms without, and not less in three of four turns"
    assert at(report.to_json(), "relu") == [("slower", f"right, but not measured to be faster: {times}")]
    artifact = {"format": "1.0", "entries": {"main": {"passes": report.records()}}}
    assert at(artifact, "relu") == [("slower", "right, but not measured to be faster")]
