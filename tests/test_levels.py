from __future__ import annotations

from itertools import pairwise

import pytest

from graphopt.errors import UsageError
from graphopt.levels import LEVELS, level_passes


def test_each_level_has_what_the_one_below_has() -> None:
    names = list(LEVELS)
    for lower, higher in pairwise(names):
        assert set(LEVELS[lower]) <= set(LEVELS[higher])
    assert LEVELS["O0"] == ()


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_exact(level: str) -> None:
    passes = level_passes(level)
    assert [item.name for item in passes] == list(LEVELS[level])
    assert {item.preserves for item in passes} <= {"exact"}


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(UsageError, match="unknown level 'O9'"):
        level_passes("O9")
