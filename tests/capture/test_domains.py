"""Domains of inputs, and inputs drawn from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.program import Domain
from tests import models


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Embedding(20, 4), nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.large(ids.long().reshape(-1)) + self.small(ids.reshape(-1))


class Masked(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.how == "bool":
            return x.masked_fill(mask.bool(), 0)
        if self.how == "compare":
            return x.masked_fill(mask == 0, 0)
        if self.how == "additive":
            return x + (1.0 - mask.float()) * -10000.0
        return x * mask


def domain_of(module: nn.Module, *examples: Tensor) -> Domain:
    return capture(module, examples).inputs[-1].domain


def test_ids_go_up_to_the_smallest_table() -> None:
    assert domain_of(TwoTables(), torch.zeros(2, 3, dtype=torch.int32)) == Domain("ids", 0, 6)


@pytest.mark.parametrize("how", ["bool", "compare", "additive"])
def test_masks_are_known_by_their_use(how: str) -> None:
    assert domain_of(Masked(how), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)).kind == "mask"


def test_integers_that_are_only_multiplied_are_no_mask() -> None:
    assert domain_of(Masked("times"), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)).kind == "any"


def test_bool_is_a_mask_and_float_is_not() -> None:
    assert domain_of(Masked("bool"), torch.ones(2), torch.ones(2, dtype=torch.bool)).kind == "mask"
    assert domain_of(Masked("times"), torch.ones(2), torch.ones(2)).kind == "any"


def test_text_model() -> None:
    program = models.program("bert")
    assert [spec.domain for spec in program.inputs] == [Domain("ids", 0, 99), Domain("mask")]
    ids, mask = draw_inputs(program, {"batch": 3, "seq": 5}, seed=1)
    assert ids.shape == mask.shape == (3, 5)
    assert ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < 100
    assert set(mask.unique().tolist()) <= {0, 1} and bool((mask.sum(-1) >= 1).all())


def test_same_seed_same_inputs() -> None:
    program = models.program("mlp")
    first, second, third = (draw_inputs(program, {"batch": 4}, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_floats_have_the_spread_of_the_examples() -> None:
    program = capture(nn.Linear(50, 2), (100 + 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0)),))
    drawn = draw_inputs(program, {}, seed=0)[0]
    assert abs(float(drawn.mean()) - 100) < 1 and abs(float(drawn.std()) - 3) < 0.5


def test_check_sizes() -> None:
    program = models.program("bert")
    assert check_sizes(program) == [{"batch": 2, "seq": 6}, {"batch": 1, "seq": 1}, {"batch": 7, "seq": 5}]
    assert check_sizes(capture(nn.ReLU(), (torch.ones(2),))) == [{}]


class LooksUp(nn.Module):
    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x.gather(1, i)


def test_positions_along_a_fixed_axis_are_ids_and_along_a_dynamic_one_are_not() -> None:
    x, i = torch.randn(3, 6), torch.zeros(3, 2, dtype=torch.int64)
    assert capture(LooksUp(), (x, i)).inputs[1].domain == Domain("ids", 0, 5)
    dynamic = capture(LooksUp(), (x, i), dynamic_shapes={"x": {1: "seq"}})
    assert dynamic.inputs[1].domain == Domain()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_whole_numbers_are_not_divided_by_nothing(dtype: torch.dtype) -> None:
    class Divided(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
            return x // by, torch.remainder(x, by.reshape(-1))

    class Share(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x / by

    rows = torch.arange(1, 5, dtype=dtype)
    assert domain_of(Divided(), rows, rows) == Domain("ids", 1, 7)
    assert domain_of(Share(), rows.float(), rows.float()) == Domain()
