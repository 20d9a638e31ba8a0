from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from graphopt import optimize
from graphopt.checking.branches import conditions, forced, search_branches, side_choices, sides_taken
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.errors import VerificationError
from graphopt.program import Program
from tests import models
from tests.passes.checking import captured


class Rare(nn.Module):
    """The condition holds for no input at all, though nothing says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond((x * x).sum() < -1, lambda x: x.sin(), lambda x: x.cos(), (x,))


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.max() > 1, lambda x: x + 1, lambda x: x + 2, (x,))

        return torch.cond(x.sum() > 0, inner, lambda x: x + 3, (x,))


def test_forced_conditions_take_the_side_chosen() -> None:
    x = torch.rand(3)
    program = captured(Rare(), x)
    assert torch.equal(forced(program, (True,))(x)[0], x.sin())
    assert torch.equal(forced(program, (False,))(x)[0], x.cos())
    assert torch.equal(program(x)[0], x.cos())


def test_every_branch_of_nested_conditions_runs() -> None:
    program = captured(Nested(), torch.rand(3))
    outer, inner = conditions(program)
    assert inner.endswith(f".{outer}") or "." in inner
    results = {float(forced(program, sides)(torch.zeros(3))[0][0]) for sides in side_choices(program)}
    assert results == {1.0, 2.0, 3.0}


def test_a_program_without_conditions_has_no_sides() -> None:
    program = captured(nn.Linear(2, 2), torch.rand(1, 2))
    assert side_choices(program) == [] and search_branches(program, []) == ([], [])


def test_inputs_are_found_for_the_branch_that_the_given_ones_leave_out() -> None:
    program = models.program("branching")
    positive = (torch.ones_like(program.examples[0]),)
    drawn, missing = search_branches(program, [positive])
    assert not missing
    assert {side for item in drawn for _, side in sides_taken(program, item.inputs)} == {False}


def test_a_branch_without_inputs_is_said() -> None:
    program = captured(Rare(), torch.rand(3))
    drawn, missing = search_branches(program, [program.examples])
    assert not drawn and missing == ["not checked: the true branch of cond"]


class BreaksSine(Pass):
    """Wrong in the branch that is never taken."""

    name = "breaks-sine"
    description = "x"

    def run(self, program: Program, context: PassContext) -> PassResult:
        changed = program.copy()
        for node in changed.nodes():
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.tan.default
        for _, module in changed.graphs():
            module.recompile()
        return PassResult(replace(changed))


def test_a_pass_that_breaks_the_other_branch_is_caught() -> None:
    program = captured(Rare(), torch.rand(3))
    with pytest.raises(VerificationError, match="with conditions forced to true"):
        optimize(program, [BreaksSine()])
