"""GPTQ: rounding column by column, each column's error made up for by those that are still to come.

With H = X^T X of the rows that the weight multiplies, and U the upper Cholesky factor of H^-1, the error of column j,
(w_j - q_j) / U_jj, is taken off column k times U_jk. Columns go in blocks, of which each is applied to all that follow
in one product.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1 and section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.low_bit.grids import Grid, Steps
from graphopt.low_bit.rounding import FitSteps, assembled, checked, own_steps
from graphopt.low_bit.weight import LowBitWeight

BLOCK = 128
DAMPING = 0.01  # of the mean of H's diagonal, added to it


class Hessian:
    """Sums X^T X in float64 over rows of values [*, K], and counts them."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def update(self, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        product = (rows.t() @ rows).double()
        self.total = product if self.total is None else self.total + product
        self.rows += len(rows)

    def result(self) -> Tensor | None:
        """H [K, K], or None before the first row."""
        return self.total if self.rows else None


def compensated(
    weight: Tensor, hessian: Tensor, grid: Grid, group: int, fit: FitSteps = own_steps, by_size: bool = False
) -> LowBitWeight:
    """The weight [N, K] rounded with regard to `hessian` [K, K]; steps are fitted to each group as it then is.

    `by_size`: columns in the order of H's diagonal, largest first, which the result keeps as its permutation. Raises
    UsageError for operands that do not fit or are not finite.
    """
    value, group = checked(weight, group)
    columns = value.shape[1]
    if tuple(hessian.shape) != (columns, columns) or not bool(hessian.isfinite().all()):
        raise UsageError(f"the Hessian of a weight with {columns} columns is finite [{columns}, {columns}]")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if by_size else None
    if order is not None:
        value, hessian = value[:, order], hessian[order][:, order]
    factor = _inverse_factor(hessian.double())
    left, codes, steps = value.double(), torch.empty_like(value, dtype=torch.uint8), list[Steps]()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(len(value), stop - start, dtype=torch.float64)
        for column in range(start, stop):
            if column % group == 0:
                rows = _as_it_is(left, errors, factor, start, column, min(column + group, columns))
                steps.append(fit(grid, rows.float()))
            own = left[:, column : column + 1]
            codes[:, column : column + 1] = grid.codes(own.float(), steps[-1])
            error = (own - grid.numbers(codes[:, column : column + 1], steps[-1])) / factor[column, column]
            left[:, column + 1 : stop] -= error * factor[column, column + 1 : stop]
            errors[:, column - start] = error[:, 0]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return assembled(grid, codes, steps, group, order)


def _as_it_is(left: Tensor, errors: Tensor, factor: Tensor, start: int, column: int, end: int) -> Tensor:
    """Columns `column` to `end` with all errors so far made up for; those beyond the block wait for its end."""
    stop = start + errors.shape[1]
    if end <= stop:
        return left[:, column:end]
    beyond = left[:, stop:end] - errors[:, : column - start] @ factor[start:column, stop:end]
    return torch.cat([left[:, column:stop], beyond], 1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H with damping; columns that are never read count as read alone."""
    diagonal = hessian.diagonal()
    unread = diagonal == 0
    total = hessian + torch.diag(torch.where(unread, 1.0, 0.0))
    mean = float(total.diagonal().mean())
    for damping in (DAMPING, 10 * DAMPING, 1.0):
        lower, failed = torch.linalg.cholesky_ex(total + torch.eye(len(total), dtype=total.dtype) * (damping * mean))
        if not int(failed):
            break
    else:
        raise UsageError("the Hessian of a weight has no Cholesky factor; give more samples")
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise UsageError("the inverse of a Hessian has no Cholesky factor; give more samples")
    return upper
