from __future__ import annotations

import pytest
import torch
from torch import nn

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
