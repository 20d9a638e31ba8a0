"""Products on AMX tiles: numbers and layout with functions in place of the instructions, then the machine code itself.

`compile` runs every case with the same kernels over tiles in memory. The emulator carries out the very instructions
that are in the artifact, and refuses what a CPU would.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import roofs
from graphopt.backends.amx import REFUSED
from graphopt.backends.rules.amx_block import pack_tiles
from graphopt.backends.rules.amx_gemm import RULE, row_stride
from graphopt.backends.target import resolve_target
from graphopt.backends.values import View
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.program import Program
from graphopt.runtime.features import host_features
from graphopt.runtime.library import ffi, open_kernels
from graphopt.runtime.tensors import aligned_copy
from tests import models
from tests.backends.amx_runs import AMX, LACKING, LEVEL, built, products_of, run_child, without_tiles
from tests.backends.conftest import Cases
from tests.backends.rules.test_pairs import Epilogues, Linears, narrow

F = nn.functional
PRODUCTS = "tiles of bfloat16"


def program_of(cases: Mapping[str, Any] | nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None) -> Program:
    return capture(cases if isinstance(cases, nn.Module) else Cases(cases), inputs, dynamic_shapes=dynamic)


def compiled(
    cases: Mapping[str, Any] | nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None, limit: float = 3e-5
) -> Artifact:
    """Compiled, checked against PyTorch at many sizes; every product is one of tiles."""
    artifact = graphopt.compile(program_of(cases, inputs, dynamic), target=LEVEL, threads=2)
    assert artifact.report["errors"]["main"] <= limit
    found = products_of(artifact)
    assert found and set(found) == {(RULE, PRODUCTS)}
    return artifact


# Numbers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [33, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (4, 16, 17, 64, None))])
def test_every_tail_of_rows_columns_and_depth(rows: int | None) -> None:
    dynamic = None if rows else {"x": {0: "rows"}}
    compiled(Linears(), (narrow(rows or 9, 384),), dynamic)


def test_epilogues_are_computed_in_the_kernel() -> None:
    artifact = compiled(Epilogues(), (narrow(2, 3, 24), torch.randn(2, 3, 24)), limit=2e-2)
    assert {"gemm_50x24_gelu_to_copy", "gemm_24x50_add"} <= set(artifact.manifest.variants[0].kernels)


def test_rows_and_panels_in_shares_and_blocks() -> None:
    """More rows than a block has, and more of everything than a thread."""
    weight = narrow(200, 1024)
    compiled({"wide": lambda x: F.linear(x.float(), weight.float())}, (narrow(1100, 1024),))


def test_a_convolution_of_one_tap_is_a_product() -> None:
    weight = narrow(40, 24, 1, 1)
    compiled({"conv": lambda x: F.conv2d(x.float(), weight.float())}, (narrow(2, 24, 5, 7),))


def test_few_rows_stay_with_vectors() -> None:
    weight = narrow(48, 64)
    program = program_of({"few": lambda x: F.linear(x.float(), weight.float())}, (narrow(3, 64),))
    assert products_of(graphopt.compile(program, LEVEL)) == [("packed-gemm", "pairs of bfloat16")]


def test_a_row_of_nan_stays_alone() -> None:
    """Rows of 40 numbers lie beside each other, and a step of the depth has 32."""
    weight = narrow(48, 40)
    program = program_of({"product": lambda x: F.linear(x.float(), weight.float())}, (narrow(35, 40),))
    x = narrow(35, 40)
    x[7], x[34] = torch.nan, torch.inf
    session = built(program)[1].session()
    (result,) = session.run(None, {"a": x.view(torch.uint16).numpy()})
    wrong = ~np.isfinite(result).all(1)
    assert np.flatnonzero(wrong).tolist() == [7, 34]


def test_rows_have_one_distance_or_vectors_multiply() -> None:
    def stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return row_stride(View(None, shape, strides))  # type: ignore[arg-type]

    assert stride((6, 8), (8, 1)) == stride((2, 3, 8), (24, 8, 1)) == 8
    assert stride((2, 3, 8), (60, 20, 1)) == 20 and stride((1, 3, 1, 8), (5, 20, 3, 1)) == 20
    assert stride((2, 3, 8), (8, 16, 1)) is None and stride((1, 1, 8), (9, 9, 1)) == 0
    weight = narrow(16, 32)
    program = program_of(
        {"swapped": lambda x: F.linear(x.transpose(0, 1).float(), weight.float())}, (narrow(4, 3, 32),)
    )
    assert products_of(graphopt.compile(program, LEVEL)) == [("packed-gemm", "pairs of bfloat16")]


def test_packing() -> None:
    """A tile's row k holds numbers 2 k and 2 k + 1 of the depth of each of 16 columns; zeros beyond the weight."""
    n, k = 40, 50
    weight = np.arange(1, n * k + 1, dtype=np.uint16).reshape(n, k)
    packed = pack_tiles(weight)
    assert packed.shape == (2, 2, 2, 16, 32)
    for column, depth in ((0, 0), (17, 5), (39, 49), (8, 33)):
        place = column // 32, depth // 32, column % 32 // 16, depth % 32 // 2, 2 * (column % 16) + depth % 2
        assert packed[place] == weight[column, depth]
    assert np.count_nonzero(packed) == n * k
    assert pack_tiles(weight.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16


# Machine code ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "dynamic"), [(9, False), (9, True), (35, False), (35, True)])
def test_the_machine_code_gives_the_bits_of_its_stand_in(
    emulator: Path, rows: int, dynamic: bool, tmp_path: Path
) -> None:
    """Of linears with every tail: the instructions have the operands, sizes and addresses that they should have."""
    program = program_of(Linears(), (narrow(rows, 384),), {"x": {0: "rows"}} if dynamic else None)
    artifact, other = built(program)
    done, results = run_child(artifact, tmp_path, LD_PRELOAD=str(emulator))
    assert done.returncode == 0, done.stdout + done.stderr
    high = 2 if rows > 16 else 1
    blocks = -(-rows // (16 * high))
    each = [blocks * -(-n // 32) * -(-k // 32) * 2 * high for k, n in Linears.SHAPES]
    assert re.search(r"(\d+) multiplications", done.stderr)[1] == str(sum(each))  # type: ignore[index]
    session = other.session()
    inputs, _ = session.samples()
    with np.load(results) as found:
        for spec, want in zip(program.outputs, session.run(None, inputs), strict=True):
            np.testing.assert_array_equal(found[spec.name], want)


def test_the_roof_of_tiles_can_be_built_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    target = without_tiles(resolve_target(LEVEL, 2))
    monkeypatch.setattr(roofs, "target_here", lambda threads: target)
    code = roofs.build_roofs(2)
    function = open_kernels("roofs", code, sha256(code).hexdigest()).get_function(roofs.MULTIPLY_TILES, True)
    result = aligned_copy(np.ones(32, np.float32), np.dtype(np.float32)).reshape(2, 16)
    function(3, ffi().from_dlpack(result))
    assert not result.any() and roofs.TILE_OPERATIONS == 4 * 2 * 16 * 16 * 32


def small() -> Artifact:
    weight = narrow(40, 70)
    return built(program_of({"one": lambda x: F.linear(x.float(), weight.float())}, (narrow(19, 70),)))[0]


def test_a_product_in_an_emulator(emulator: Path, tmp_path: Path) -> None:
    artifact = small()
    done, results = run_child(artifact, tmp_path, LD_PRELOAD=str(emulator))
    assert done.returncode == 0 and "24 multiplications" in done.stderr
    with np.load(results) as found:
        np.testing.assert_allclose(found["one"], artifact.check["main.output.one"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_transformer_in_an_emulator(emulator: Path, tmp_path: Path) -> None:
    """Every linear is a product of tiles, no kernel is slow, and the numbers are those of the program in PyTorch."""
    module, inputs, dynamic = models.bert()
    program = capture(module, inputs, dynamic_shapes=dynamic)
    program = graphopt.optimize(program, "O2,mixed-precision{dtype=bf16}", target=LEVEL).program
    artifact, _ = built(program)
    assert set(products_of(artifact)) == {(RULE, PRODUCTS)} and not artifact.report["slow"]
    done, results = run_child(artifact, tmp_path, LD_PRELOAD=str(emulator))
    assert done.returncode == 0 and "multiplications" in done.stderr, done.stdout + done.stderr
    with np.load(results) as found:
        for spec in program.outputs:
            want = artifact.check[f"main.output.{spec.name}"]
            assert np.abs(found[spec.name] - want).max() < 1e-2 * np.abs(want).max()


def test_refused_tiles_are_an_error_of_loading(emulator: Path, tmp_path: Path) -> None:
    done, _ = run_child(small(), tmp_path, LD_PRELOAD=str(emulator), AMX_EMULATOR_REFUSES="1")
    assert done.returncode == 3 and done.stdout.startswith("ArtifactError") and REFUSED in done.stdout


@pytest.mark.skipif(bool(AMX & host_features() or LACKING), reason="needs a CPU that lacks nothing but AMX")
def test_a_machine_without_tiles_refuses_them(tmp_path: Path) -> None:
    """Where flags promised what Linux does not give."""
    done, _ = run_child(small(), tmp_path)
    assert done.returncode == 3 and done.stdout.startswith("ArtifactError") and REFUSED in done.stdout


def test_the_probe_runs_the_instructions(emulator: Path) -> None:
    code = "from graphopt.backends.amx_probe import amx_works; print(amx_works())"
    for preloaded, works in ((str(emulator), "True"), ("", "False")):
        variables = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == works, done.stderr
