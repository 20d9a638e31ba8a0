from __future__ import annotations

from itertools import pairwise

import pytest

from graphopt.errors import UnknownNameError, UsageError
from graphopt.levels import LEVELS, level_passes, spelled_passes


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


def test_a_level_goes_before_other_passes() -> None:
    passes = spelled_passes("O2,mixed-precision{dtype=bf16},dead-code")
    assert [item.name for item in passes] == [*LEVELS["O2"], "mixed-precision", "dead-code"]
    with pytest.raises(UsageError, match="O2 is a level and takes no options"):
        spelled_passes("O2{max-bytes=1}")
    with pytest.raises(UsageError, match="unknown level 'O7'"):
        spelled_passes("dead-code,O7")
    with pytest.raises(UnknownNameError):
        spelled_passes("O2,no-such-pass")
