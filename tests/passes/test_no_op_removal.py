from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.passes.no_op_removal import NoOpRemoval
from tests.passes.checking import captured, check_pass, targets


class Function(nn.Module):
    """A module out of a function of tensors."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


REMOVED = [
    lambda x: x.clone().sin(),
    lambda x: x.detach().sin(),
    lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float32).sin(),
    lambda x: x.view(4, 6).sin(),
    lambda x: x.reshape(-1, 6).sin(),
    lambda x: x.expand(4, -1).sin(),
    lambda x: x[0:].sin(),
    lambda x: x.permute(0, 1).sin(),
    lambda x: x.squeeze(0).sin(),
    lambda x: nn.functional.pad(x, (0, 0)).sin(),
    lambda x: nn.functional.dropout(x.sin(), 0.5, training=False).cos(),
    lambda x: (x * 1).sin(),
    lambda x: (x / 1.0).sin(),
    lambda x: (x - 0).sin(),
    lambda x: (x + -0.0).sin(),
    lambda x: (x.sign().long() + 0).sin(),
]
KEPT = [
    lambda x: x.view(6, 4).sin(),
    lambda x: x[1:].sin(),
    lambda x: x.flip(0).sin(),
    lambda x: x.t().sin(),
    lambda x: x.double().sin(),
    lambda x: (x * 2).sin(),
    lambda x: (1 - x).sin(),
    lambda x: (x.sign().long() / 1).sin(),
    lambda x: x.roll(1, 0).sin(),
    lambda x: nn.functional.pad(x, (1, -1)).sin(),
]


@pytest.mark.parametrize("function", REMOVED)
def test_fires(function: object) -> None:
    program = captured(Function(function), torch.randn(4, 6))
    count = program.count_operators()
    result = check_pass(program, NoOpRemoval(), rewrites=1)
    assert result.program.count_operators() == count - 1


@pytest.mark.parametrize("function", KEPT)
def test_leaves_alone(function: object) -> None:
    check_pass(captured(Function(function), torch.randn(4, 6)), NoOpRemoval(), rewrites=0)


def test_adding_positive_zero_changes_negative_zero() -> None:
    check_pass(captured(Function(lambda x: x + 0.0), torch.randn(3)), NoOpRemoval(), 0, "turns -0.0 into 0.0")


@pytest.mark.parametrize(
    "function", [lambda x: x.t().t().sin(), lambda x: x.permute(1, 0).transpose(0, 1).sin()], ids=["t", "permute"]
)
def test_pairs_that_undo_each_other_go(function: object) -> None:
    result = check_pass(captured(Function(function), torch.randn(2, 3)), NoOpRemoval(), rewrites=1)
    assert targets(result.program) == ["aten.sin"]


def test_permutations_that_do_not_undo_each_other_stay() -> None:
    program = captured(Function(lambda x: x.permute(1, 2, 0).permute(1, 2, 0).sin()), torch.randn(2, 3, 4))
    check_pass(program, NoOpRemoval(), rewrites=0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.clone(), "memory of the input"),
        (lambda x: x.clone().view(-1), "memory of the input"),
        (lambda x: (x.sin(), x.sin().clone()), None),
    ],
)
def test_outputs_that_would_alias_keep_their_copy(function: object, reason: str | None) -> None:
    check_pass(captured(Function(function), torch.randn(2, 3)), NoOpRemoval(), int(reason is None), reason)


def test_two_outputs_of_one_memory_keep_their_copy() -> None:
    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.sin()
        return y, y.clone()

    check_pass(captured(Function(twice), torch.randn(2)), NoOpRemoval(), 0, "would be the same memory")


def test_a_copy_that_a_view_needs_stays() -> None:
    program = captured(Function(lambda x: x.t().contiguous().view(-1).sin()), torch.randn(2, 3))
    check_pass(program, NoOpRemoval(), 0, "cannot take it")


def test_a_copy_that_changes_only_the_layout_goes_where_nothing_needs_it() -> None:
    check_pass(captured(Function(lambda x: x.t().contiguous().sin()), torch.randn(2, 3)), NoOpRemoval(), rewrites=1)


def test_symbolic_sizes_are_compared_as_expressions() -> None:
    program = captured(
        Function(lambda x: x.view(x.shape[0], -1).sin()), torch.randn(4, 6), dynamic={"x": {0: "rows", 1: "columns"}}
    )
    assert "aten.view" in targets(program)
    check_pass(program, NoOpRemoval(), rewrites=1)


def test_branches_are_walked() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: (x * 1).sin(), lambda x: x.clone(), (x,))

    check_pass(captured(Function(branches), torch.randn(3)), NoOpRemoval(), 1, "memory of the input")


EVERY = torch.arange(4).view(4, 1), torch.arange(6)
THREE = torch.arange(3)
RESHAPED = [
    (lambda x: x.view(24).view(2, 12).sin(), 1),
    (lambda x: x.sin().view(24).view(2, 12).view(6, 4).cos(), 2),
    (lambda x: x.sin().view(3, 8)[THREE].view(4, 6).cos(), 2),
    (lambda x: x.sin()[EVERY[0], EVERY[1]].cos(), 1),
]
NOT_RESHAPED = [
    lambda x: x.sin()[EVERY[0], EVERY[1].flip(0)].cos(),
    lambda x: x.sin()[EVERY[0], EVERY[1][:3]].cos(),
    lambda x: x.sin().t()[EVERY[1].view(6, 1), EVERY[0].view(4)].cos(),
    lambda x: x.view(24).sin().view(2, 12),
]


@pytest.mark.parametrize(("function", "rewrites"), RESHAPED)
def test_one_reshape_is_enough(function: object, rewrites: int) -> None:
    result = check_pass(captured(Function(function), torch.randn(4, 6)), NoOpRemoval(), rewrites=rewrites)
    assert targets(result.program).count("aten.view") <= 1 and "aten.index" not in targets(result.program)


@pytest.mark.parametrize("function", NOT_RESHAPED)
def test_other_indices_stay(function: object) -> None:
    check_pass(captured(Function(function), torch.randn(4, 6)), NoOpRemoval(), rewrites=0)


def test_an_index_that_is_an_output_keeps_its_memory() -> None:
    program = captured(Function(lambda x: x[EVERY[0], EVERY[1]]), torch.randn(4, 6))
    check_pass(program, NoOpRemoval(), 0, "would be the memory of the input x")


class Rows(nn.Module):
    """Rows of a table by computed numbers: as many as the table has where the open size is the example's."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.table[numbers % 4]


def test_an_index_over_an_open_size_leaves_it_open() -> None:
    program = captured(Rows(), torch.arange(4), dynamic={"numbers": {0: "rows"}})
    result = check_pass(program, NoOpRemoval(), rewrites=0)
    assert result.program(torch.arange(7))[0].shape == (7, 6)
    (taken,) = [node for node in result.program.nodes() if node.target is torch.ops.aten.index.Tensor]
    assert not taken.meta["val"].shape[0].node.expr.is_number
