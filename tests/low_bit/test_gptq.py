"""GPTQ: nothing to gain from uncorrelated inputs, much from correlated ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.low_bit.gptq import BLOCK, Hessian, compensated
from graphopt.low_bit.grids import Grid, Kind
from graphopt.low_bit.rounding import least_error_steps, rounded
from graphopt.low_bit.weight import LowBitWeight

COLUMNS = 144  # more than a block


def correlated(rows: int = 2048, rank: int = 48, seed: int = 0) -> Tensor:
    """Inputs of few directions and some noise, with channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, COLUMNS, generator=generator) * torch.linspace(0.2, 3, COLUMNS)
    noise = 0.1 * torch.randn(rows, COLUMNS, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ mixing + noise


def hessian_of(x: Tensor) -> Tensor:
    seen = Hessian()
    for part in x.reshape(4, -1, x.shape[1]):
        seen.update(part)
    found = seen.result()
    assert found is not None
    return found


def weight(seed: int = 1) -> Tensor:
    return torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(seed))


def lost(found: LowBitWeight, x: Tensor) -> float:
    """The noise's share of the power of the product."""
    own, reference = x @ found.dequantize().t(), x @ weight().t()
    return float((own - reference).square().sum() / reference.square().sum())


@pytest.mark.parametrize(("kind", "bits"), [("affine", 4), ("affine", 2), ("nf4", 4), ("bitmod", 3), ("sign", 1)])
def test_equal_to_rounding_for_the_identity(kind: Kind, bits: int) -> None:
    grid = Grid(kind, bits)
    found = compensated(weight(), 3 * torch.eye(COLUMNS), grid, 36)
    plain = rounded(weight(), grid, 36)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize(
    ("kind", "bits", "share"),
    [("affine", 4, 0.5), ("affine", 3, 0.5), ("affine", 2, 0.7), ("fp4", 4, 0.5), ("ternary", 2, 0.8)],
)
@pytest.mark.parametrize("by_size", [False, True])
def test_correlated_inputs_lose_less(kind: Kind, bits: int, share: float, by_size: bool) -> None:
    """On rows that it never saw."""
    grid, unseen = Grid(kind, bits), correlated(4096)[2048:]
    found = compensated(weight(), hessian_of(correlated()), grid, 64, least_error_steps, by_size)
    assert lost(found, unseen) < share * lost(rounded(weight(), grid, 64, least_error_steps), unseen)
    assert (found.permutation is not None) == by_size


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One column at a time is the algorithm as it is defined; a group that straddles blocks sees all errors."""
    arguments = weight(), hessian_of(correlated()), Grid("affine", 3), 80
    whole = compensated(*arguments)
    assert COLUMNS > BLOCK
    monkeypatch.setattr("graphopt.low_bit.gptq.BLOCK", 1)
    alone = compensated(*arguments)
    assert (whole.codes == alone.codes).float().mean() > 0.999
    torch.testing.assert_close(whole.scale, alone.scale, rtol=1e-4, atol=0)


def test_inputs_that_are_always_zero_or_too_few_are_taken() -> None:
    x = correlated(24)
    x[:, 5] = 0
    found = compensated(weight(), hessian_of(x), Grid("affine", 4), 64)
    assert bool(found.dequantize().isfinite().all())
    assert lost(found, x) < lost(rounded(weight(), Grid("affine", 4), 64), x)


def test_a_hessian_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"with 144 columns is finite \[144, 144\]"):
        compensated(weight(), torch.eye(5), Grid("affine", 4), 64)
