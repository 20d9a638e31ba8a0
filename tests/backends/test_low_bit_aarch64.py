"""Low-bit products as code for 64-bit Arm, run in an emulator: bit for bit what PyTorch computes.

A CPU for each way that products are made: SMULL and pairwise sums on plain NEON, SDOT, and USDOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from tests.backends.rules.test_low_bit import TAILS, Case, Products, activations, lut_build
from tests.backends.rules.test_low_bit_look_ups import EXACT, FEW, LOOKED_UP, ROUNDED
from tests.backends.test_aarch64 import CPUS, emulated, with_emulator

UNPACKED = "bits taken apart"
OTHERS = [  # what is computed by a path of its own: bits, a codebook, several of them, one of 256 entries
    Case(1, 37, 100, 16, "half", bias=True),
    Case(3, 19, 70, 24, "int"),
    Case(4, 33, 96, 32),
    Case(4, 5, 64, 32, book=4),
    Case(8, 5, 64, 64, book=1),
    Case(8, 5, 64, 64, extreme=True),
]


class Joined(nn.Module):
    """All results in one; before them what one row of activations becomes."""

    def __init__(self, products: Sequence[Products]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, x: Tensor) -> Tensor:
        found = [*lut_build(x * 0.37, 96)]
        for each in self.products:
            found += each(x).values()
        return torch.cat([each.float().flatten() for each in found])


def check(level: str, rows: int, folder: Path, *products: Products) -> set[str]:
    """What the products are made of; their results are compared."""
    x = activations(rows, 256)
    program = capture(Joined(products), (x,))
    result, lowered = emulated(program, level, (x,), folder)
    np.testing.assert_array_equal(np.frombuffer(result, np.float32), program.graph_module(x)[0].numpy())
    return {str(info.configuration["products"]) for info in lowered.kernels.values() if info.rule == "low-bit"}


@with_emulator
@pytest.mark.parametrize("level, rows", [("cpu:aarch64", 1), ("cpu:cortex-a78ae", 3)])
def test_products_in_an_emulator(level: str, rows: int, tmp_path: Path) -> None:
    looked_up = [Products(FEW[:2], kernel="lut"), Products(FEW[2:], table="int8")]
    assert check(level, rows, tmp_path, Products(OTHERS, kernel="unpack"), *looked_up) == {UNPACKED, LOOKED_UP}


@pytest.mark.slow
@with_emulator
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("level", CPUS)
def test_every_tail_in_an_emulator(level: str, rows: int, tmp_path: Path) -> None:
    check(level, rows, tmp_path, Products(TAILS, kernel="unpack"))


@pytest.mark.slow
@with_emulator
@pytest.mark.parametrize("level", CPUS)
def test_every_look_up_in_an_emulator(level: str, tmp_path: Path) -> None:
    products = [Products(EXACT, kernel="lut"), Products(ROUNDED, table="int8")]
    assert check(level, 3, tmp_path, *products) == {LOOKED_UP}
