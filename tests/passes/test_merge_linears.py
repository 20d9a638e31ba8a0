from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.merge_linears import MergeLinears
from tests.passes.checking import captured, check_pass, targets


class Heads(nn.Module):
    """Linears over one input, added up after an activation."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x).relu() for linear in self.linears)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_fires(biases: tuple[bool, ...]) -> None:
    module = Heads(*(nn.Linear(8, 4 + index, bias=bias) for index, bias in enumerate(biases)))
    result = check_pass(captured(module, torch.randn(2, 3, 8)), MergeLinears(), rewrites=1)
    assert targets(result.program)[:2] == ["aten.linear", "aten.split_with_sizes"]
    shapes = [tuple(weight.shape) for weight in result.program.graph_module.state_dict().values()]
    assert shapes == [(15, 8), (15,)][: 1 + any(biases)]
    assert result.rewrites[0].before == ("linear", "linear_1", "linear_2")


class Branches(nn.Module):
    """Linears of one input on one side of a condition: their weights are operands of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cond(
            x.sum() > 0, lambda x: self.left(x).relu() * self.right(x), lambda x: x.sin(), (x,)
        )
        return found


def test_fires_in_a_branch_that_is_given_its_weights(tmp_path: Path) -> None:
    program = captured(Branches(), torch.ones(2, 8))
    result = check_pass(program, MergeLinears(), rewrites=1)
    (branch,) = [module for path, module in result.program.graphs() if path.startswith("true")]
    assert [node.target for node in branch.graph.nodes].count(torch.ops.aten.linear.default) == 1
    x = -torch.ones(2, 8)
    assert torch.equal(result.program(x)[0], program(x)[0])
    graphopt.compile(result.program)  # which checks both sides
    result.program.save(str(tmp_path / "m.pt2"))
    assert torch.equal(graphopt.capture(tmp_path / "m.pt2")(torch.ones(2, 8))[0], result.program(torch.ones(2, 8))[0])


class Returned(nn.Module):
    """Two linears of one input that are what one side of a condition gives."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = torch.cond(
            x.sum() > 0, lambda x: (self.left(x), self.right(x)), lambda x: (x.sin(), x.cos()), (x,)
        )
        return found


def test_what_leaves_a_branch_keeps_its_layout() -> None:
    check_pass(captured(Returned(), torch.ones(2, 8)), MergeLinears(), 0, "it leaves its branch")


def test_the_first_type_and_row_length_decide() -> None:
    class Mixed(Heads):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first, second = self.linears
            return first(x), second(x), nn.functional.linear(x, x.sum() * torch.ones(6, 8))

    module = Mixed(nn.Linear(8, 4), nn.Linear(8, 5))
    check_pass(captured(module, torch.randn(2, 8)), MergeLinears(), 1, "the weight is no constant")


def test_one_linear_alone_stays() -> None:
    program = captured(Heads(nn.Linear(8, 4)), torch.randn(2, 8))
    check_pass(program, MergeLinears(), 0, "no other linear reads the same input")


class Tied(nn.Module):
    """The weights of two linears are also read on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self.first(x) + self.second(x)
        return merged @ self.first.weight @ self.second.weight


def test_weights_that_others_read_would_be_held_twice() -> None:
    program = captured(Tied(), torch.randn(2, 8))
    check_pass(program, MergeLinears(max_bytes=511), 0, "512 bytes of old weights")
    check_pass(program, MergeLinears(max_bytes=512), rewrites=1)


class Flattened(nn.Module):
    """A reader of the linears that only takes contiguous memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).view(-1) * self.second(x).view(-1)


def test_a_reader_that_needs_contiguous_memory_keeps_the_linears() -> None:
    program = captured(Flattened(), torch.randn(2, 8))
    result = check_pass(program, MergeLinears(), 0, "cannot take it")
    assert "merge_linears_0" not in result.program.graph_module.state_dict()
