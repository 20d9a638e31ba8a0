"""Products of 8-bit codes on AMX tiles: exact sums with functions in place of the instructions, then the machine code.

`compile` runs every case with the same kernels over tiles in memory and compares codes with codes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.arrays import tensor_of
from graphopt.backends.rules.amx_block import pack_tiles
from graphopt.backends.rules.amx_gemm import RULE
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.program import Program
from tests.backends.amx_runs import LEVEL, built, products_of, run_child
from tests.backends.rules.test_integer_products import NUMBER, Images, Linears, codes, compiled, frozen, qlinear, rules

TILES = (RULE, "tiles of uint8")


@pytest.mark.parametrize("rows", [33, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (4, 16, 17, 64, None))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_every_tail_of_rows_columns_and_depth(rows: int | None, dtype: torch.dtype) -> None:
    """With every epilogue."""
    dynamic = None if rows else {"x": {0: "rows"}, "added": {0: "rows"}}
    inputs = (codes(rows or 9, 384, dtype=dtype), codes(rows or 9, 97, seed=9))
    artifact, _ = compiled(Linears(dtype), inputs, LEVEL, dynamic)
    assert set(products_of(artifact)) == {TILES}


def test_few_rows_stay_with_vectors() -> None:
    artifact, _ = compiled(Linears(torch.uint8), (codes(3, 384), codes(3, 97, seed=9)), LEVEL)
    assert set(products_of(artifact)) == {("integer-gemm", "4 codes of uint8")}


@pytest.mark.slow
def test_convolutions_of_one_tap_are_products_of_tiles_and_those_in_groups_of_vectors() -> None:
    artifact, _ = compiled(Images(), (codes(2, 512, 9, 11),), LEVEL)
    assert set(products_of(artifact)) == {TILES} and {"integer-convolution", "depthwise"} <= rules(artifact)


def test_packing() -> None:
    """A tile's row k holds codes 4 k to 4 k + 3 of the depth of each of 16 columns; zeros beyond the weight."""
    n, k = 40, 100
    weight = codes(n, k, dtype=torch.int8).numpy()
    packed = pack_tiles(weight)
    assert packed.shape == (2, 2, 2, 16, 64) and packed.dtype == np.int8
    for column, depth in ((0, 0), (17, 5), (39, 99), (8, 66)):
        place = column // 32, depth // 64, column % 32 // 16, depth % 64 // 4, 4 * (column % 16) + depth % 4
        assert packed[place] == weight[column, depth]
    assert np.count_nonzero(packed) == np.count_nonzero(weight)


class Sums(nn.Module):
    """int32 sums as float32: of every tail, and as far from 0 as they can be."""

    SHAPES = ((1, 1), (64, 16), (67, 33), (130, 40), (512, 7))

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([frozen(codes(n, k, dtype=torch.int8, seed=k)) for k, n in self.SHAPES])
        self.deep = nn.ParameterList([frozen(torch.full((3, 65536), w).to(torch.int8)) for w in (127, -127, -128)])
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(131, dtype=torch.uint8))

    def forward(self, x: Tensor, full: Tensor) -> tuple[Tensor, ...]:
        operands: list[tuple[Any, ...]] = [
            (x[:, : weight.shape[1]], self.one, self.zero, weight) for weight in self.weights
        ]
        operands += [(full, self.one, None, weight) for weight in self.deep]
        return tuple(qlinear(*each, self.one, None, *(None,) * 5, **NUMBER) for each in operands)


def check_sums(emulator: Path, folder: Path, program: Program, rows: int) -> None:
    artifact, _ = built(program)
    assert set(products_of(artifact)) == {TILES}
    done, results = run_child(artifact, folder, LD_PRELOAD=str(emulator))
    assert done.returncode == 0, done.stdout + done.stderr
    high = 2 if rows > 16 else 1
    shapes = [*Sums.SHAPES, *[(65536, 3)] * 3]
    each = [-(-rows // (16 * high)) * -(-n // 32) * -(-k // 64) * 2 * high for k, n in shapes]
    assert re.search(r"(\d+) multiplications", done.stderr)[1] == str(sum(each))  # type: ignore[index]
    inputs = [tensor_of(artifact.check[f"main.input.{spec.name}"], spec.dtype) for spec in program.inputs]
    with np.load(results) as found:
        for spec, wanted in zip(program.outputs, program(*inputs), strict=True):
            np.testing.assert_array_equal(found[spec.name], wanted.numpy())
    assert {float(wanted.max()) for wanted in program(*inputs)[-3:]} == {
        float(np.float32(255 * sign * 65536)) for sign in (127, -127, -128)
    }


@pytest.mark.parametrize(
    ("rows", "dynamic"),
    [(5, False), *(pytest.param(r, d, marks=pytest.mark.slow) for r, d in ((35, False), (35, True)))],
)
def test_the_machine_code_gives_the_sums_of_the_reference(
    emulator: Path, rows: int, dynamic: bool, tmp_path: Path
) -> None:
    inputs = (codes(rows, 512), torch.full((rows, 65536), 255, dtype=torch.uint8))
    shapes = {"x": {0: "rows"}, "full": {0: "rows"}} if dynamic else None
    check_sums(emulator, tmp_path, capture(Sums(), inputs, dynamic_shapes=shapes), rows)


@pytest.mark.slow
def test_epilogues_in_an_emulator(emulator: Path, tmp_path: Path) -> None:
    """The very codes and numbers of the functions in place of the instructions."""
    program = capture(Linears(torch.uint8), (codes(35, 384), codes(35, 97, seed=9)))
    run_both(emulator, tmp_path, *built(program), program)


@pytest.mark.slow
def test_convolutions_in_an_emulator(emulator: Path, tmp_path: Path) -> None:
    program = capture(Images(), (codes(2, 512, 9, 11),))
    run_both(emulator, tmp_path, *built(program), program)


def run_both(emulator: Path, folder: Path, artifact: Artifact, other: Artifact, program: Program) -> None:
    done, results = run_child(artifact, folder, LD_PRELOAD=str(emulator))
    assert done.returncode == 0 and "multiplications" in done.stderr, done.stdout + done.stderr
    session = other.session()
    inputs, _ = session.samples()
    with np.load(results) as found:
        for spec, want in zip(program.outputs, session.run(None, inputs), strict=True):
            np.testing.assert_array_equal(found[spec.name], want)
