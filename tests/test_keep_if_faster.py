"""Rewrites stay only where the model is measured to be faster with them; the measurement itself is played here."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import Pass, PassContext, Timing
from graphopt.errors import CompileError, UsageError
from graphopt.pipeline import Pipeline
from graphopt.program import Program
from graphopt.race import Outcome
from graphopt.report import PassReport
from graphopt.rewrite import RewritePass, Rule
from tests.passes.checking import captured, targets

aten = torch.ops.aten


class ToClamp(Rule):
    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.relu.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.clamp_min.default(x, 0.0)


class ToProduct(Rule):
    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.square.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.mul.Tensor(x, x)


@dataclass(frozen=True)
class Both(RewritePass):
    """Two rules, of which either may pay."""

    name = "both"
    rules = (ToClamp, ToProduct)


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.square(x)) + torch.relu(x)


COSTS = {"aten.relu": 10.0, "aten.square": 10.0}


def run(item: Pass | None = None, **costs: float) -> tuple[Program, PassReport]:
    """Optimize with a race that adds up the cost of every operator."""
    prices = {**COSTS, **{f"aten.{name}": cost for name, cost in costs.items()}}

    def seconds(program: Program) -> float:
        return sum(prices.get(name, 1.0) * number for name, number in Counter(targets(program)).items())

    def race(first: Program, second: Program) -> Outcome:
        before, after = seconds(first), seconds(second)
        return Outcome(Timing(before, 1), Timing(after, 1), after < before)

    pipeline = Pipeline((item or Both(),), PassContext(), "numeric", strict=False, race=race)
    program, report = pipeline.run(captured(Net(), torch.randn(3)))
    return program, report.passes[0]


def test_what_is_faster_stays() -> None:
    program, report = run(clamp_min=1.0, mul=1.0)
    assert len(report.rewrites) == 3 and not report.slower
    assert "aten.relu" not in targets(program)


def test_only_the_rule_that_is_slower_goes() -> None:
    program, report = run(clamp_min=90.0, mul=1.0)
    assert {item.rule for item in report.rewrites} == {"both/to-product"}
    (slower,) = report.slower
    assert slower.rule == "both/to-clamp" and len(slower.ids) == 2
    assert slower.seconds_with > slower.seconds_without
    assert targets(program).count("aten.relu") == 2 and "aten.mul" in targets(program)
    assert not any("refused" in item.reason for item in report.declined)


def test_all_go_where_none_is_faster() -> None:
    program, report = run(clamp_min=10.0, mul=10.0)
    assert not report.rewrites and {item.rule for item in report.slower} == {"both/to-clamp", "both/to-product"}
    assert targets(program) == targets(captured(Net(), torch.randn(3)))


class ToClampAtOne(Rule):
    """Wrong: relu(x) is not the largest of x and 1."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.relu.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.clamp_min.default(x, 1.0)


class ToMaximum(ToClamp):
    """Another way to write relu, for where ToClamp is refused."""

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.maximum.default(x, aten.mul.Tensor(x, 0.0))


@dataclass(frozen=True)
class Choice(RewritePass):
    """Three rules for one place, the first of them wrong."""

    name = "choice"
    rules = (ToClampAtOne, ToClamp, ToMaximum)


def test_where_a_rule_is_slower_no_other_takes_its_place_unmeasured() -> None:
    program, report = run(Choice(), clamp_min=10.0)
    assert not report.rewrites and {item.rule for item in report.slower} == {"choice/to-clamp"}
    assert targets(program).count("aten.relu") == 2 and "aten.maximum" not in targets(program)
    assert not report.declined


def test_what_was_wrong_stays_in_the_account_when_the_rest_is_slower() -> None:
    report = run(Choice(), clamp_min=10.0)[1]
    assert [item.rule for item in report.rolled_back] == ["choice/to-clamp-at-one"] * 2


def test_passes_that_only_take_work_away_are_not_measured() -> None:
    @dataclass(frozen=True)
    class Cleanup(Both):
        name = "cleanup"
        measured = False

    def race(first: Program, second: Program) -> Outcome:
        raise AssertionError("measured")

    pipeline = Pipeline((Cleanup(),), PassContext(), "numeric", strict=False, race=race)
    assert len(pipeline.run(captured(Net(), torch.randn(3)))[1].passes[0].rewrites) == 3


def test_the_real_race_compiles_both_and_decides() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    program = captured(Twins(), torch.randn(4, 8))
    report = graphopt.optimize(program, "merge-linears", keep_if_faster=True, threads=1).report.passes[0]
    assert len(report.rewrites) + len(report.slower) == 1
    for item in report.slower:
        assert item.seconds_with > 0 and item.seconds_without > 0


def test_an_operator_without_a_lowering_cannot_be_measured() -> None:
    class Singular(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.linalg.svdvals(x))

    program = captured(Singular(), torch.randn(3, 3))
    with pytest.raises(CompileError, match=r"keep_if_faster cannot measure .*: aten.*svd.* has no lowering .*; leave"):
        graphopt.optimize(program, [Both()], keep_if_faster=True, threads=1)


def test_a_target_of_another_machine_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import race
    from graphopt.errors import ArtifactError

    def refuse(*_: Any, **__: Any) -> Any:
        raise ArtifactError("it needs avx9000")

    monkeypatch.setattr(importlib.import_module("graphopt.compile"), "compile", refuse)
    program = captured(nn.ReLU(), torch.randn(2))
    assert race.measure_on("cpu", None)(program) is None
    with pytest.raises(UsageError, match="nothing can be measured for target 'cpu' on this machine: it needs avx9000"):
        race.race_on("cpu", None)(program, replace(program))
