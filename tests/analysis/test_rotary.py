"""Rotary embeddings in the spellings that networks have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.analysis.rotary import find_rotaries
from graphopt.capture import capture
from graphopt.program import Program

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., :4], x[..., 4:]
    return x * cos + torch.cat([-second, first], -1) * sin


def chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return sin * torch.cat([-second, first], -1) + cos * x


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + rotated * sin


def neighbours_by_cat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.cat([(-x[..., 1::2]).unsqueeze(-1), x[..., ::2].unsqueeze(-1)], -1).reshape(x.shape)
    return x * cos + rotated * sin


def one_by_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def neighbours_one_by_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, rest = x[..., :6], x[..., 6:]
    rotated = torch.cat([-x[..., 3:], x[..., :3]], -1)
    return torch.cat([x * cos[..., :6] + rotated * sin[..., :6], rest], -1)


def not_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([x[..., 4:], x[..., :4]], -1) * sin


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([x[..., 4:], -x[..., :4]], -1) * sin


def unequal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin


def of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.relu() * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def not_in_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def mixed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., :4], sin[..., :4]
    return torch.cat([first * cos - second * sin, second * sin + first * cos], -1)


class Calls(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.spelling(x, cos, sin)


def program_of(spelling: Spelling) -> Program:
    return capture(Calls(spelling), (torch.randn(2, 3, 5, 8), torch.randn(5, 8), torch.randn(5, 8)))


@pytest.mark.parametrize("spelling", [halves, chunks, neighbours, neighbours_by_cat, one_by_one, neighbours_one_by_one])
def test_found(spelling: Spelling) -> None:
    program = program_of(spelling)
    (found,) = find_rotaries(program)
    x, cos, sin = program.graph_module.graph.find_nodes(op="placeholder")
    assert found.value is x and found.interleaved == ("neighbours" in spelling.__name__)
    for wave, given in ((found.cosine, cos), (found.sine, sin)):
        assert given in (wave, *wave.all_input_nodes)


def test_of_a_part_of_the_channels() -> None:
    (found,) = find_rotaries(program_of(partial))
    assert tuple(found.value.meta["val"].shape) == (2, 3, 5, 6)


@pytest.mark.parametrize("spelling", [not_negated, turned_back, unequal, of_another, not_in_turn, mixed])
def test_not_found(spelling: Spelling) -> None:
    assert not list(find_rotaries(program_of(spelling)))
