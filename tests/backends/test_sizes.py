"""What is known of a size before it is known."""

from __future__ import annotations

import pytest
import sympy

from graphopt.backends.sizes import Size, least

S, T = sympy.Symbol("s", integer=True), sympy.Symbol("t", integer=True)


@pytest.mark.parametrize(
    ("size", "value"),
    [(7, 7), (S, 1), (2 * S, 2), (2 * S - 2, 2), (2 * S + 2, 4), (S - 3, 1), (3 * S * T + 1, 4), (6 * (S // 2), 6)],
)
def test_the_least_of_a_size(size: Size, value: int) -> None:
    assert least(size) == value
