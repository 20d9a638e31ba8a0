from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import Pass
from graphopt.errors import UnknownNameError, UsageError
from graphopt.explain import Answer, explain, group
from graphopt.passes.batch_norm_folding import BatchNormFolding
from graphopt.passes.common_subexpressions import CommonSubexpressions
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.passes.dead_code import DeadCode
from graphopt.passes.decided_conditions import DecidedConditions
from graphopt.passes.merge_linears import MergeLinears
from graphopt.passes.no_op_removal import NoOpRemoval
from graphopt.program import Program
from graphopt.report import Report
from graphopt.rewrite import RewritePass, Rule
from tests.passes.checking import captured

aten = torch.ops.aten


class Function(nn.Module):
    """A module out of a function of tensors and of itself, which has two layers and a weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def program_of(function: Callable[..., Any], **options: Any) -> Program:
    return captured(Function(function).eval(), torch.randn(4, 4), **options)


def report_of(function: Callable[..., Any], *passes: Pass, **options: Any) -> Any:
    """The report as it is read from a file."""
    return json.loads(json.dumps(graphopt.optimize(program_of(function), passes, **options).report.to_json()))


def at(report: Any, node: str, pass_: str | None = None) -> list[tuple[str, str]]:
    return [(answer.outcome, answer.sentence) for answer in explain(report, node, pass_)]


@dataclass(frozen=True)
class SigmoidProduct(Rule):
    min_rows: int

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.mul.Tensor(x, aten.sigmoid.default(aten.add.Tensor(x, 1.0)))

    def check(self, *, x: Any) -> str | None:
        rows = x.meta["val"].shape[0]
        return f"{rows} rows are fewer than min-rows={self.min_rows}" if rows < self.min_rows else None

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.mul.Tensor(x, aten.sigmoid.default(aten.add.Tensor(x, 1.0)))


@dataclass(frozen=True)
class ProductFusion(RewritePass):
    name = "product-fusion"
    rules = (SigmoidProduct,)
    min_rows: int = 1


@dataclass(frozen=True)
class Difference(Rule):
    @staticmethod
    def pattern(x: Any, y: Any) -> Any:
        return aten.sub.Tensor(aten.exp.default(x), y)

    def check(self, *, y: Any, **_: Any) -> str | None:
        return None if y.op == "get_attr" else f"{y.name} is no constant"

    @staticmethod
    def rewrite(x: Any, y: Any) -> Any:
        return aten.sub.Tensor(aten.exp.default(x), y)


@dataclass(frozen=True)
class DifferenceFusion(RewritePass):
    name = "difference-fusion"
    rules = (Difference,)


@dataclass(frozen=True)
class Pair(Rule):
    @staticmethod
    def pattern(x: Any, y: Any) -> Any:
        return aten.sin.default(x), aten.mul.Tensor(aten.cos.default(x), y)

    @staticmethod
    def rewrite(x: Any, y: Any) -> Any:
        return aten.sin.default(x), aten.mul.Tensor(aten.cos.default(x), y)


@dataclass(frozen=True)
class PairFusion(RewritePass):
    name = "pair-fusion"
    rules = (Pair,)


@dataclass(frozen=True)
class Shorter(Rule):
    """Changes the size of a value, which its readers may not take; or its numbers."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.tan.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.slice.Tensor(aten.tan.default(x), 0, 0, 3)


@dataclass(frozen=True)
class Shorten(RewritePass):
    name = "shorten"
    rules = (Shorter,)


def product(model: Function, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 1.0)


def read_elsewhere(model: Function, x: Tensor) -> Tensor:
    y = torch.sigmoid(x + 1.0)
    return x * y + y


def read_early(model: Function, x: Tensor) -> Tensor:
    y = x.sin()
    return x.cos() * (y + 1.0)


def decided(model: Function, x: Tensor) -> Tensor:
    rows = torch.arange(4)
    return torch.where(rows.ge(2), x, -x)


NEAR_MISSES: dict[str, tuple[Callable[..., Any], Pass, str, str, str]] = {
    "wrong operator in the middle": (
        lambda model, x: x * torch.tanh(x + 1.0),
        ProductFusion(),
        "mul",
        "near miss",
        "1 of 3 parts of the pattern are there: other of mul is tanh (aten.tanh.default) "
        "where the pattern has aten.sigmoid.default",
    ),
    "another number": (
        lambda model, x: x * torch.sigmoid(x + 2.0),
        ProductFusion(),
        "mul",
        "near miss",
        "3 of 3 parts of the pattern are there: other of add is 2.0 where the pattern has 1.0",
    ),
    "another value in one of two places": (
        lambda model, x: x * torch.sigmoid(model.weight + 1.0),
        ProductFusion(),
        "mul",
        "near miss",
        "3 of 3 parts of the pattern are there: x is x (an input) in one place and weight (a constant) in another",
    ),
    "an inner value is read elsewhere": (
        read_elsewhere,
        ProductFusion(),
        "mul",
        "declined",
        "the inner value sigmoid is also used by add_1",
    ),
    "a condition on the shape": (
        product,
        ProductFusion(min_rows=64),
        "mul",
        "declined",
        "4 rows are fewer than min-rows=64",
    ),
    "a weight is no constant": (
        lambda model, x: torch.exp(x) - torch.relu(x),
        DifferenceFusion(),
        "sub",
        "declined",
        "relu is no constant",
    ),
    "operands the other way round": (
        lambda model, x: model.weight - torch.exp(x),
        DifferenceFusion(),
        "sub",
        "near miss",
        "1 of 2 parts of the pattern are there: input of sub is weight (a constant) "
        "where the pattern has aten.exp.default",
    ),
    "an output is read before the inputs are there": (
        read_early,
        PairFusion(),
        "sin",
        "declined",
        "an output is used before all inputs of the rewrite are there",
    ),
    "readers cannot take the new value": (
        lambda model, x: torch.tan(x) @ model.weight + x,
        Shorten(),
        "tan",
        "declined",
        "",
    ),
    "a batch norm after something else": (
        lambda model, x: model.norm(torch.relu(model.first(x))),
        BatchNormFolding(),
        "_native_batch_norm_legit_no_training",
        "near miss",
        "1 of 2 parts of the pattern are there: its input is relu (aten.relu.default), "
        "neither a convolution nor a linear",
    ),
    "a convolution that is read twice": (
        lambda model, x: model.norm(y := model.first(x)) + y,
        BatchNormFolding(),
        "_native_batch_norm_legit_no_training",
        "declined",
        "linear is also used by add",
    ),
    "statistics of the batch": (
        lambda model, x: nn.functional.batch_norm(model.first(x), None, None, training=True),
        BatchNormFolding(),
        "_native_batch_norm_legit",
        "declined",
        "it normalizes with the statistics of the batch (training=True)",
    ),
    "no bytes left": (
        lambda model, x: x + torch.cat([model.weight] * 4)[2:6],
        ConstantFolding(max_bytes=100),
        "cat",
        "declined",
        "its 256 bytes exceed max-bytes=100",
    ),
    "a linear alone": (
        lambda model, x: model.first(x),
        MergeLinears(),
        "linear",
        "declined",
        "no other linear reads the same input",
    ),
    "a shape that changes": (
        lambda model, x: x.reshape(2, 8),
        NoOpRemoval(),
        "view",
        "near miss",
        "1 of 2 parts of the pattern are there: the shape changes from [4, 4] to [2, 8]",
    ),
    "a number that is not neutral": (
        lambda model, x: x * 2.0,
        NoOpRemoval(),
        "mul",
        "near miss",
        "1 of 2 parts of the pattern are there: aten.mul.Tensor with 2.0 changes values",
    ),
    "a value of which nothing is known": (
        lambda model, x: torch.where(x.to(torch.int64).ge(2), x, -x),
        DecidedConditions(),
        "ge",
        "near miss",
        "1 of 2 parts of the pattern are there: nothing is known of the values of _to_copy (aten._to_copy.default)",
    ),
    "two conditions that are open": (
        lambda model, x: torch.where(x.gt(0) & x.lt(1), x, -x),
        DecidedConditions(),
        "and_1",
        "near miss",
        "1 of 2 parts of the pattern are there: neither gt nor lt is known to be the same everywhere",
    ),
    "old weights that would stay": (
        lambda model, x: model.first(x) + model.second(x) + model.first.weight + model.second.weight,
        MergeLinears(max_bytes=100),
        "linear_1",
        "declined",
        "128 bytes of old weights would stay beside the merged one, over max-bytes=100",
    ),
    "a range that leaves it open": (
        decided,
        DecidedConditions(),
        "ge",
        "declined",
        "values from 0 to 3 do not decide a comparison with 2",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_near_miss_is_answered_with_the_first_difference(case: str) -> None:
    function, item, node, outcome, sentence = NEAR_MISSES[case]
    report = report_of(function, item)
    assert report["passes"][0]["rewrites"] == []
    (answer,) = explain(report, node, item.name)
    assert (answer.outcome, answer.node) == (outcome, node)
    assert answer.sentence == sentence or not sentence
    assert answer.rule.startswith(item.name)


def chain(model: Function, x: Tensor) -> Tensor:
    y = x.relu().clone()
    return model.first(y) + model.second(y) + x.relu() + torch.sin(model.weight * 2.0)


LEVEL = (DeadCode(), ConstantFolding(), NoOpRemoval(), CommonSubexpressions(), MergeLinears())


def test_sizes_have_the_names_that_the_user_gave() -> None:
    program = program_of(lambda model, x: x.reshape(-1, 2, 2), dynamic={"x": {0: "rows"}})
    report = graphopt.optimize(program, [NoOpRemoval()]).report.to_json()
    ((_, sentence),) = at(report, "view")
    assert sentence.endswith("the shape changes from [rows, 4] to [rows, 2, 2]")


def test_a_node_is_followed_to_what_stands_in_its_place() -> None:
    report = report_of(chain, *LEVEL)
    assert at(report, "clone") == [
        ("untouched", "dead-code recorded nothing at clone (aten.clone.default): an output depends on it"),
        (
            "untouched",
            "constant-folding recorded nothing at clone (aten.clone.default): "
            "its value depends on an input, or storing it would save nothing",
        ),
        ("applied", "clone (aten.clone.default) gave way to relu (aten.relu.default)"),
        ("applied", "relu_1 (aten.relu.default) gave way to relu (aten.relu.default)"),
        ("untouched", "merge-linears starts at aten.linear.default; relu is aten.relu.default"),
    ]
    (merged,) = at(report, "linear_1", "merge-linears")
    assert merged[0] == "applied" and merged[1].startswith(
        "linear (aten.linear.default), linear_1 (aten.linear.default) became linear_default (aten.linear.default), "
    )
    assert at(report, "linear_default")[0][0] == "applied"


def test_a_node_that_a_pass_took_along_with_another() -> None:
    report = report_of(chain, *LEVEL)
    assert at(report, "mul", "constant-folding") == [
        ("removed", "nothing reads it any more after the rewrites of this pass")
    ]
    assert at(report, "mul", "merge-linears") == [("gone", "it had been removed by constant-folding")]
    assert at(report, "sin", "constant-folding")[0][1].startswith(
        "sin (aten.sin.default) gave way to constant_folding_0"
    )


def test_a_dead_node() -> None:
    def unread(model: Function, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x.sin(), (x,))

    program = program_of(unread)
    branch = program.graph_module.get_submodule("true_graph_0")
    assert isinstance(branch, torch.fx.GraphModule)
    (relu,) = branch.graph.find_nodes(op="call_function", target=aten.relu.default)
    with branch.graph.inserting_after(relu):
        dead = branch.graph.call_function(aten.tan.default, (relu,))
    dead.meta["val"] = relu.meta["val"]
    report = graphopt.optimize(program, [DeadCode()]).report.to_json()
    assert at(report, "true_graph_0.tan_default") == [
        ("applied", "true_graph_0.tan_default (aten.tan.default) was taken out: nothing reads it")
    ]


def test_without_a_node_alike_answers_are_counted() -> None:
    def many(model: Function, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * torch.tanh(x + 1.0)
        return x * torch.sigmoid(x + 1.0)

    answers = explain(report_of(many, ProductFusion(min_rows=64)))
    assert [answer.outcome for answer in answers] == ["declined", *["near miss"] * 5]
    first, second = group(answers)
    assert (first.count, first.example.node, second.count, second.example.node) == (5, "mul", 1, "mul_5")


def test_one_pass() -> None:
    report = report_of(chain, *LEVEL)
    assert {answer.pass_name for answer in explain(report, pass_="no-op-removal")} == {"no-op-removal"}
    with pytest.raises(UnknownNameError, match="unknown pass of this report 'merge'; did you mean 'merge-linears'"):
        explain(report, pass_="merge")


def test_an_unknown_node_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="the report has no node 'linaer'; did you mean 'linear'"):
        explain(report_of(chain, *LEVEL), "linaer")


def test_an_artifact_has_its_entries_and_runs_one_after_the_other() -> None:
    program = program_of(chain)
    program = graphopt.optimize(graphopt.optimize(program, [NoOpRemoval()]).program, [MergeLinears()]).program
    report = json.loads(json.dumps({"format": "1.0", "entries": {"step": {"passes": program.history}}}))
    answers = explain(report, "linear")
    assert [(answer.entry, answer.position, answer.outcome) for answer in answers] == [
        ("step", 1, "untouched"),
        ("step", 2, "applied"),
    ]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, "format None, not 1.x"),
        ({"format": "2.0"}, "format '2.0'"),
        ([1], "no report of graphopt"),
        ({"format": "1.0"}, "KeyError: 'passes'"),
        ({"format": "1.0", "passes": [{}], "nodes": {}}, "no report of graphopt"),
        ({"format": "1.0", "passes": 3, "nodes": {}}, "no report of graphopt"),
        ({"format": "1.0", "entries": [1]}, "no report of graphopt"),
    ],
)
def test_other_json_is_refused(report: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        explain(report, "relu")


def test_answers_are_in_the_order_of_the_passes() -> None:
    answers: list[Answer] = explain(report_of(chain, *LEVEL))
    assert [answer.position for answer in answers] == sorted(answer.position for answer in answers)
    assert isinstance(graphopt.optimize(program_of(chain), LEVEL).report, Report)
