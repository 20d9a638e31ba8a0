"""The linear assignment problem: one column for each row so that the sum of what they have in common is largest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_assignment(profit: NDArray[np.float64]) -> NDArray[np.intp]:
    """The column of each row of `profit` [n, n] in an assignment with the largest sum.

    The Hungarian method with shortest augmenting paths (Jonker and Volgenant 1987): rows whose best column is free
    take it, and each other row changes those before it along the cheapest path. Time is at most cubic.
    """
    cost = profit.max(axis=1, keepdims=True) - profit
    size = len(cost)
    column_of, row_of = np.full(size, -1), np.full(size, -1)
    row_price, column_price = np.zeros(size), np.zeros(size)
    for row, column in enumerate(cost.argmin(axis=1).tolist()):
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for left in np.flatnonzero(column_of < 0):
        _augment(int(left), cost, column_of, row_of, row_price, column_price)
    return column_of


def _augment(
    start: int, cost: NDArray[np.float64], column_of: Any, row_of: Any, row_price: Any, column_price: Any
) -> None:
    """Assign the row `start` along the path of least reduced cost, which is never negative, to a free column."""
    size = len(cost)
    distance, before = np.full(size, np.inf), np.full(size, start)
    done = np.zeros(size, dtype=bool)
    row, least = start, 0.0  # the row that is reached last, at this distance
    while True:
        reached = least + cost[row] - row_price[row] - column_price
        nearer = ~done & (reached < distance)
        distance[nearer], before[nearer] = reached[nearer], row
        column = int(np.where(done, np.inf, distance).argmin())
        least = distance[column]
        if row_of[column] < 0:
            break
        done[column] = True
        row = int(row_of[column])
    row_price[start] += least
    row_price[row_of[done]] += least - distance[done]
    column_price[done] -= least - distance[done]
    while True:
        row = int(before[column])
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
