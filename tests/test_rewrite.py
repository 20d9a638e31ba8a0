from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.contract import PassContext
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.program import Program, provenance
from graphopt.rewrite import RewritePass, Rule
from tests.passes.checking import captured, check_pass, targets

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleRelu(Rule):
    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.relu.default(aten.relu.default(x))

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.relu.default(x)


@dataclass(frozen=True)
class OneRelu(RewritePass):
    name = "one-relu"
    rules = (DoubleRelu,)


class Function(nn.Module):
    """A module out of a function of tensors."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


def program_of(function: object, *shape: int, **options: Any) -> Program:
    return captured(Function(function), torch.randn(shape or (3, 4)), **options)


def test_fires_and_says_where() -> None:
    result = check_pass(program_of(lambda x: x.sin().relu().relu().cos()), OneRelu(), rewrites=1)
    assert targets(result.program) == ["aten.sin", "aten.relu", "aten.cos"]
    (rewrite,) = result.rewrites
    assert (rewrite.id, rewrite.rule) == ("one-relu/double-relu@relu_1", "one-relu/double-relu")
    assert (rewrite.before, rewrite.after) == (("relu", "relu_1"), ("relu_default",))


def test_new_nodes_know_where_they_come_from() -> None:
    program = program_of(lambda x: x.relu().relu())
    (_, anchor) = (node for node in program.nodes() if node.op == "call_function")
    result = OneRelu().run(program, PassContext())
    (new,) = (node for node in result.program.nodes() if node.op == "call_function")
    assert provenance(new) == {"rule": "one-relu/double-relu", "from": ["relu", "relu_1"]}
    assert new.meta["stack_trace"] == anchor.meta["stack_trace"]


def test_provenance_goes_back_to_the_captured_nodes() -> None:
    result = check_pass(program_of(lambda x: x.relu().relu().relu()), OneRelu(), rewrites=2)
    (new,) = (node for node in result.program.nodes() if node.op == "call_function")
    assert provenance(new)["from"] == ["relu", "relu_1", "relu_2"]


def test_an_inner_value_that_is_read_elsewhere_declines() -> None:
    def escaping(x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        return y.relu() + y

    check_pass(program_of(escaping), OneRelu(), 0, "the inner value relu is also used by add")


def test_branches_are_rewritten_and_named_by_path() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.relu().relu(), lambda x: x.relu().sin(), (x,))

    result = check_pass(program_of(branches), OneRelu(), rewrites=1)
    assert result.rewrites[0].id == "one-relu/double-relu@true_graph_0.relu_1"


def test_refused_ids_are_left_alone_and_only_those() -> None:
    program = program_of(lambda x: x.relu().relu().sin().relu().relu())
    first = "one-relu/double-relu@relu_1"
    result = OneRelu().run(program, PassContext(allow=lambda identity: identity != first))
    assert [item.id for item in result.rewrites] == ["one-relu/double-relu@relu_3"]
    assert result.declined[0].reason == "its id was refused"


@dataclass(frozen=True)
class ScaleRows(Rule):
    """Fold a factor into the weight; needs a constant and a limit from the pass."""

    limit: int

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, factor: Any) -> Any:
        return aten.mul.Tensor(aten.linear.default(x, w, b), factor)

    def check(self, *, w: Any, b: Any, factor: Any, **_: Any) -> str | None:
        if not isinstance(factor, float) or w.op != "get_attr" or b is not None:
            return "only a constant weight times a literal is folded"
        rows = w.meta["val"].shape[0]
        return f"{rows} rows exceed limit={self.limit}" if rows > self.limit else None

    @staticmethod
    def rewrite(x: Any, w: Any, b: Any, factor: Any) -> Any:
        weight = graphopt.program.get_attribute(w.node.graph.owning_module, w.node.target)
        return aten.linear.default(x, weight.detach() * factor)


@dataclass(frozen=True)
class FoldFactors(RewritePass):
    name = "fold-factors"
    rules = (ScaleRows,)
    limit: int = 8


def scaled(bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, bias=bias), Function(lambda x: x * 2.0))


def test_a_tensor_in_a_rewrite_becomes_an_attribute() -> None:
    result = check_pass(captured(scaled(), torch.randn(2, 4)), FoldFactors(), rewrites=1)
    assert list(result.program.graph_module.state_dict()) == ["fold_factors_0"]


def test_options_of_the_pass_reach_the_rule() -> None:
    check_pass(captured(scaled(), torch.randn(2, 4)), FoldFactors(limit=7), 0, "8 rows exceed limit=7")
    check_pass(captured(scaled(bias=True), torch.randn(2, 4)), FoldFactors(), 0, "only a constant weight")


@dataclass(frozen=True)
class SinCos(Rule):
    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.sin.default(x), aten.cos.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        y = aten.mul.Tensor(x, 1.0)
        return aten.sin.default(y), aten.cos.default(y)


@dataclass(frozen=True)
class Rotate(RewritePass):
    name = "rotate"
    rules = (SinCos,)


def test_several_outputs_are_replaced_together() -> None:
    program = program_of(lambda x: (x.sin().relu(), x.cos().relu()))
    result = Rotate().run(program, PassContext())
    assert len(result.rewrites) == 1
    assert targets(result.program).count("aten.sin") == targets(result.program).count("aten.cos") == 1
    x = torch.randn(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(program(x), result.program(x), strict=True))


@dataclass(frozen=True)
class Widen(Rule):
    """Changes the size of a value, which its readers may not take."""

    @staticmethod
    def pattern(x: Any) -> Any:
        return aten.tanh.default(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return aten.cat.default([x, x], 1)


@dataclass(frozen=True)
class WidenAll(RewritePass):
    name = "widen-all"
    rules = (Widen,)


def test_meta_of_readers_is_propagated_as_far_as_it_changes() -> None:
    program = program_of(lambda x: x.tanh().sin().sum(1, keepdim=True).cos(), dynamic={"x": {0: "rows"}})
    result = WidenAll().run(program, PassContext())
    shapes = [list(node.meta["val"].shape)[1] for node in result.program.nodes() if node.op == "call_function"]
    assert shapes == [8, 8, 1, 1]
    before = {node.name: node.meta["val"] for node in program.nodes() if node.op == "call_function"}
    (last,) = (node for node in result.program.nodes() if node.name == "cos")
    assert last.meta["val"] is before["cos"]


def test_a_reader_that_cannot_take_the_new_value_declines() -> None:
    result = WidenAll().run(program_of(lambda x: x.tanh() + torch.ones(4)), PassContext())
    assert not result.rewrites
    assert "add" in result.declined[0].reason and "cannot take it" in result.declined[0].reason


def test_a_rewrite_with_the_wrong_number_of_values_is_an_error() -> None:
    @dataclass(frozen=True)
    class Broken(SinCos):
        @staticmethod
        def rewrite(x: Any) -> Any:
            return aten.sin.default(x)

    @dataclass(frozen=True)
    class BrokenPass(RewritePass):
        name = "broken"
        rules = (Broken,)

    with pytest.raises(PassError, match="rewrites 2 values but returned 1"):
        BrokenPass().run(program_of(lambda x: (x.sin(), x.cos())), PassContext())


def test_one_attribute_a_storage() -> None:
    program = captured(nn.Linear(4, 8), torch.randn(2, 4))
    edit = Edit(program, PassContext(), "shared")
    (editor,) = edit.graphs()
    weight = editor.constant_value(next(node for node in editor.nodes() if node.name.endswith("weight")))
    assert weight is not None
    assert editor.attribute_for(weight) == ("weight", False)
    name, is_new = editor.attribute_for(weight[:2].detach())
    stored = getattr(editor.module, name)
    assert is_new and stored.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_a_long_chain_takes_one_walk() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x.sin().relu().relu()
        return x

    seen: list[str] = []
    program = program_of(chain)
    result = OneRelu().run(program, PassContext(allow=lambda identity: not seen.append(identity)))  # type: ignore[func-returns-value]
    assert len(result.rewrites) == len(seen) == 200
