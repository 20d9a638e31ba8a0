from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.passes.common_subexpressions import CommonSubexpressions
from tests.passes.checking import captured, check_pass, targets


class Function(nn.Module):
    """A module out of a function of tensors."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "rewrites"),
    [
        (lambda x: x.relu() + x.relu(), 1),
        (lambda x: (x.sin() + x.cos()) * (x.cos() + x.sin()), 3),
        (lambda x: x.sum(-1) * x.sum(-1, keepdim=False), 1),
        (lambda x: (x + 1) * (x + 1.5), 0),
        (lambda x: (x * 1) - (x * True), 0),
        (lambda x: x.sin() - x.cos(), 0),
        (lambda x: torch.sub(x, x.sin()) * torch.sub(x.sin(), x), 1),
    ],
)
def test_equal_values_are_computed_once(function: object, rewrites: int) -> None:
    check_pass(captured(Function(function), torch.randn(4, 4)), CommonSubexpressions(), rewrites)


def test_chains_merge_in_one_run() -> None:
    program = captured(Function(lambda x: x.sin().cos().relu() + x.sin().cos().relu()), torch.randn(4))
    result = check_pass(program, CommonSubexpressions(), rewrites=3)
    assert targets(result.program) == ["aten.sin", "aten.cos", "aten.relu", "aten.add"]


def test_outputs_keep_memory_of_their_own() -> None:
    program = captured(Function(lambda x: (x.relu(), x.relu().view(-1))), torch.randn(2, 2))
    result = check_pass(program, CommonSubexpressions(), 0, "would be the same memory")
    first, second = result.program(torch.randn(2, 2))
    assert first.data_ptr() != second.data_ptr()


def test_random_operators_are_never_merged() -> None:
    from graphopt.contract import PassContext

    program = captured(Function(lambda x: x.sin() * x.cos()), torch.randn(3))
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is not torch.ops.aten.mul.Tensor:
            node.target = torch.ops.aten.rand_like.default
    program.graph_module.recompile()
    assert not CommonSubexpressions().run(program, PassContext()).rewrites


def test_branches_are_walked_one_by_one() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() + x.sin(), lambda x: x.sin() * x.cos(), (x,))

    result = check_pass(captured(Function(branches), torch.randn(3)), CommonSubexpressions(), rewrites=1)
    assert result.rewrites[0].id == "common-subexpressions@true_graph_0.sin_1"
