"""Which tile is chosen for a shape, on every level."""

from __future__ import annotations

import pytest
import sympy

from graphopt.backends.rules.register_tile import Tile, choose_tile, tile_cost, tiles
from graphopt.backends.target import LEVELS, Target, resolve_target

SHAPES = [(1, 1, 1), (49, 512, 2048), (196, 256, 1024), (128, 384, 384), (3136, 64, 64), (7, 50257, 768)]


@pytest.fixture(params=LEVELS)
def target(request: pytest.FixtureRequest) -> Target:
    return resolve_target(request.param, 2)


def test_every_tile_fits_the_registers(target: Target) -> None:
    assert all(tile.vectors * (tile.rows + 1) < target.registers for tile in tiles(target))


def test_the_chosen_tile_costs_least(target: Target) -> None:
    for rows, columns, depth in SHAPES:
        chosen = choose_tile(target, rows, columns, depth)
        costs = [tile_cost(target, tile, rows, columns, depth) for tile in tiles(target)]
        assert tile_cost(target, chosen, rows, columns, depth) == min(costs)


def test_little_is_wasted_with_avx512() -> None:
    target = resolve_target("cpu:x86-64-v4", 1)
    assert choose_tile(target, 3136, 64, 64).vectors == 4
    assert choose_tile(target, 49, 2048, 512).rows == 7
    assert choose_tile(target, 128, 384, 384) == Tile(8, 3)
    assert choose_tile(target, 1, 768, 768).rows == 1


def test_rows_known_at_run_time_are_taken_as_many() -> None:
    target = resolve_target("cpu:x86-64-v4", 1)
    assert choose_tile(target, sympy.Symbol("rows"), 768, 768).rows >= 6
