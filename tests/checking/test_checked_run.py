"""Wrong rewrites are named and taken back, each on its own; the right ones around them stay."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Build, Edit
from graphopt.errors import PostconditionError, VerificationError
from graphopt.program import Program
from graphopt.rewrite import RewritePass, Rule
from tests.passes.checking import captured, targets

aten = torch.ops.aten


def calling(target: Callable[..., Any], *args: Any) -> Build:
    """One call in the place of one node."""
    return lambda builder: [builder.call(target, *args)]


class Right(Rule):
    """relu as a maximum with 0."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.relu.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.clamp_min.default(x, 0.0)


class WrongSign(Rule):
    """sin(x) is not -sin(x)."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.sin.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.neg.default(aten.sin.default(x))


class WrongForNegative(Rule):
    """abs(x) is x only where x >= 0."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.abs.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.mul.Tensor(x, 1.0)


class WrongAtBatchOne(Rule):
    """exp(x) times the sign of the spread over all rows, which is 1 but for a single row."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.exp.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        spread = aten.sub.Tensor(aten.amax.default(x, [0], True), aten.amin.default(x, [0], True))  # 0 for one row
        return aten.mul.Tensor(aten.exp.default(x), aten.sign.default(spread))


@dataclass(frozen=True)
class Planted(RewritePass):
    """Right rewrites, and three wrong ones among them."""

    name = "planted"
    rules = (Right, WrongSign, WrongForNegative, WrongAtBatchOne)


class Model(nn.Module):
    """relu, sin and exp in the main graph; relu and abs in both branches of a cond, abs of a square in one of them."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x) + x.sin() + x.exp()
        z: Tensor = torch.cond(
            y.sum() > 1e9, lambda v: torch.relu(v) + (v - 3).abs(), lambda v: torch.relu(v) * (v * v).abs(), (y,)
        )
        return torch.relu(z)


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Model(), torch.randn(4, 3), dynamic={"x": {0: "batch"}})


def test_three_wrong_rules_at_once_are_named_and_the_right_ones_stay(program: Program) -> None:
    (report,) = graphopt.optimize(program, [Planted()]).report.passes
    found = {item.rule: item for item in report.rolled_back}
    assert set(found) == {"planted/wrong-sign", "planted/wrong-for-negative", "planted/wrong-at-batch-one"}
    assert all(item.local for item in report.rolled_back) and len(report.rolled_back) == 3
    assert "batch=1" in found["planted/wrong-at-batch-one"].reason
    assert "conditions forced to true" in found["planted/wrong-for-negative"].reason
    assert found["planted/wrong-for-negative"].node.startswith("true_graph_0.")
    rules = sorted(item.rule for item in report.rewrites)
    assert rules == ["planted/right"] * 4 + ["planted/wrong-for-negative"]  # abs of a square is right


def test_what_is_left_computes_the_same(program: Program) -> None:
    result = graphopt.optimize(program, [Planted()]).program
    assert targets(result).count("aten.clamp_min") == 4 and "aten.relu" not in targets(result)
    for x in (torch.randn(1, 3), torch.randn(5, 3)):
        assert torch.equal(result(x)[0], program(x)[0])


def test_strict_makes_it_an_error_that_names_the_rewrite(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"the rewrite planted/wrong-.*@.* is wrong: .* is off by"):
        graphopt.optimize(program, [Planted()], strict=True)


def test_strict_says_nothing_where_all_is_right() -> None:
    program = captured(nn.ReLU(), torch.randn(2, 3))
    assert graphopt.optimize(program, [Planted()], strict=True).report.nodes_after


class Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(30):
            x = torch.relu(x) * 0.9
        return x


@dataclass(frozen=True)
class Blind(Pass):
    """Replaces every relu and reports no instances; the one at number `wrong` is wrong."""

    name = "blind"
    wrong: tuple[int, ...]
    runs: tuple[list[int], ...] = ([],)

    def run(self, program: Program, context: PassContext) -> PassResult:
        self.runs[0].append(1)
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            relus = [node for node in editor.nodes() if node.target is aten.relu.default]
            for number, node in enumerate(relus):
                low = 5.0 if number in self.wrong else 0.0
                source = node.args[0]
                editor.replace("clamp", [node], calling(aten.clamp_min.default, source, low))
        edit.instances.clear()
        return edit.finish()


@pytest.mark.parametrize("wrong", [(0,), (29,), (3, 17)])
def test_what_cannot_be_checked_alone_is_found_by_leaving_out(wrong: tuple[int, ...]) -> None:
    program = captured(Chain(), torch.randn(2, 3))
    runs: list[int] = []
    (report,) = graphopt.optimize(program, [Blind(wrong, (runs,))]).report.passes
    relus = [node.name for node in program.graph_module.graph.nodes if node.target is aten.relu.default]
    assert {item.node for item in report.rolled_back} == {relus[number] for number in wrong}
    assert not any(item.local for item in report.rolled_back)
    assert len(report.rewrites) == 30 - len(wrong)
    assert len(runs) <= len(wrong) * (2 * math.log2(30) + 8)


class Together(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).sin() / 2


def test_a_rewrite_of_a_rewrite_is_checked_on_its_own_values() -> None:
    class ToSum(Rule):
        @staticmethod
        def pattern(x: Any) -> Any:
            return aten.mul.Tensor(x, 2)

        @staticmethod
        def rewrite(x: Any) -> Any:
            return aten.add.Tensor(x, x)

    @dataclass(frozen=True)
    class Two(RewritePass):
        name = "two"
        rules = (ToSum, WrongSign)

    program = captured(Together(), torch.randn(4))
    (report,) = graphopt.optimize(program, [Two()]).report.passes
    assert [item.rule for item in report.rewrites] == ["two/to-sum"]
    assert [item.rule for item in report.rolled_back] == ["two/wrong-sign"]
    assert set(report.errors) == {item.id for item in report.rewrites}


def test_a_rewrite_that_changes_a_shape_on_purpose_is_judged_by_the_whole() -> None:
    class Transposed(Rule):
        @staticmethod
        def pattern(x: Any) -> Any:
            return aten.relu.default(x)

        @staticmethod
        def rewrite(x: Any) -> Any:
            return aten.view.default(aten.relu.default(x), [4, 3])

    @dataclass(frozen=True)
    class Fixed(RewritePass):
        name = "fixed"
        rules = (Transposed,)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).sum()

    program = captured(Net(), torch.randn(4, 3))
    result = graphopt.optimize(program, [Fixed()]).report.passes[0]
    assert not result.rolled_back and len(result.rewrites) == 1


class Nested(nn.Module):
    """sin of a positive value on three ways through two conditions, of any value on one."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(v: Tensor) -> Tensor:
            result: Tensor = torch.cond(v.sum() > 1e9, lambda w: (w - 1).abs(), lambda w: w.exp().abs(), (v,))
            return result

        outcome: Tensor = torch.cond(x.sum() > 1e9, inner, lambda v: v.exp().abs(), (x,))
        return outcome


def test_a_wrong_rewrite_in_a_branch_of_a_branch_is_named() -> None:
    @dataclass(frozen=True)
    class Hasty(RewritePass):
        name = "hasty"
        rules = (WrongForNegative,)

    program = captured(Nested(), torch.randn(4, 3))
    (report,) = graphopt.optimize(program, [Hasty()]).report.passes
    (wrong,) = report.rolled_back
    assert wrong.node.count("true_graph") == 2 and wrong.local
    assert len(report.rewrites) == 2


def test_a_size_of_the_examples_written_as_a_number_is_named() -> None:
    @dataclass(frozen=True)
    class Baked(Pass):
        name = "baked"

        def run(self, program: Program, context: PassContext) -> PassResult:
            edit = Edit(program, context, self.name)
            for editor in edit.graphs():
                for node in editor.nodes():
                    if node.target is aten.sym_size.int:
                        editor.replace("baked", [node], lambda builder: [4])
            return edit.finish()

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[0]

    program = captured(Scaled(), torch.randn(4, 3), dynamic={"x": {0: "batch"}})
    (report,) = graphopt.optimize(program, [Baked()]).report.passes
    assert not report.rewrites and "is 4 instead of 1" in report.rolled_back[0].reason


def test_state_is_followed() -> None:
    class Sum(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x.sum(0).sin())
            return torch.relu(self.total)

    (report,) = graphopt.optimize(captured(Sum(), torch.randn(4, 3)), [Planted()]).report.passes
    assert [item.rule for item in report.rewrites] == ["planted/right"]
    assert [item.rule for item in report.rolled_back] == ["planted/wrong-sign"]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@dataclass(frozen=True)
class Deaf(Pass):
    """Never asks; `change` is made to what it says of its rewrites."""

    name = "deaf"
    change: Callable[[Program, PassResult], PassResult] = lambda program, result: result

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, PassContext(), self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                if node.target is aten.sin.default:
                    editor.replace("cosine", [node], calling(aten.cos.default, node.args[0]))
        return self.change(program, edit.finish())


def with_instance_of(_: Program, result: PassResult) -> PassResult:
    return replace(result, instances=tuple(replace(item, id="other@sin") for item in result.instances))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda program, result: result, "it made the rewrite cosine@sin, which was refused; ask context.allow"),
        (with_instance_of, "its instance other@sin is none of its rewrites"),
        (lambda program, result: replace(result, rewrites=result.rewrites * 2), "2 rewrites have the id cosine@sin"),
        (lambda program, result: replace(result, program=program), "it returned the program that it was given"),
    ],
)
def test_an_account_that_cannot_be_true_is_an_error(change: Callable[..., PassResult], words: str) -> None:
    with pytest.raises(PostconditionError, match=f"pass deaf: {words}"):
        graphopt.optimize(captured(Sine(), torch.randn(3)), [Deaf(change)])


def test_a_number_computed_of_sizes_may_round_otherwise() -> None:
    @dataclass(frozen=True)
    class Reciprocal(Pass):
        name = "reciprocal"
        factor: float

        def run(self, program: Program, context: PassContext) -> PassResult:
            edit = Edit(program, context, self.name)
            for editor in edit.graphs():
                for node in editor.nodes():
                    if node.target is operator.truediv:
                        editor.replace("product", [node], calling(operator.mul, node.args[0], self.factor))
            return edit.finish()

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x.shape[0] / 3)

    program = captured(Scaled(), torch.randn(4, 3), dynamic={"x": {0: "batch"}})
    assert (
        len(graphopt.optimize(program, [Reciprocal(1 / 3)]).report.passes[0].rewrites) == 1
    )  # 7 / 3 is not 7 * (1 / 3)
    assert len(graphopt.optimize(program, [Reciprocal(0.3334)]).report.passes[0].rolled_back) == 1


def test_what_is_wrong_only_after_the_first_call_is_taken_back() -> None:
    class Phase(nn.Module):
        phase: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phase", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            result = self.phase.sin() + x
            self.phase.add_(x)
            return result

    (report,) = graphopt.optimize(captured(Phase(), torch.randn(3)), [Planted()]).report.passes
    assert "called again" in report.rolled_back[0].reason and not report.rewrites


def test_an_output_that_is_no_tensor_is_ill_formed() -> None:
    @dataclass(frozen=True)
    class OnlySize(Pass):
        name = "only-size"

        def run(self, program: Program, context: PassContext) -> PassResult:
            copy = program.copy()
            nodes = copy.graph_module.graph.nodes
            (size,) = (node for node in nodes if node.target is aten.sym_size.int)
            next(iter(reversed(nodes))).args = ((size,),)
            return PassResult(copy)

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[0]

    program = captured(Scaled(), torch.randn(4, 3), dynamic={"x": {0: "batch"}})
    with pytest.raises(PostconditionError, match=r"output output is s.*, which is no tensor"):
        graphopt.optimize(program, [OnlySize()])
