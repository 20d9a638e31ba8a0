"""Convolutions on AMX tiles: exact sums of codes, bfloat16 within rounding, and nothing read that is not in a window.

`compile` runs every case: with the instructions where the machine has them, else with functions in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends import amx
from graphopt.backends.rules.amx_convolution import RULE, Configuration, Geometry, offered, pack_filter_tiles
from graphopt.backends.rules.windows import Window
from graphopt.backends.target import resolve_target
from graphopt.backends.values import View
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.program import Program
from graphopt.runtime.features import host_features
from tests.backends.amx_runs import AMX, LEVEL, build_emulator, built, run_child
from tests.backends.conftest import Cases
from tests.backends.rules.test_integer_products import NUMBER, Images, codes, compiled, frozen, qconv, rules
from tests.backends.rules.test_pairs import narrow

F = nn.functional
# channels, outputs, taps, stride, padding, dilation
WINDOWS: tuple[tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]], ...] = (
    (64, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    (64, 33, (3, 3), (2, 2), (1, 1), (1, 1)),
    (40, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    (130, 7, (1, 1), (2, 2), (0, 0), (1, 1)),
    (32, 40, (1, 1), (2, 3), (1, 0), (1, 1)),
    (16, 24, (3, 2), (1, 3), (2, 0), (2, 3)),
    (20, 8, (2, 5), (3, 1), (0, 4), (1, 1)),
    (68, 70, (1, 5), (1, 2), (0, 2), (1, 2)),
    (36, 12, (4, 1), (2, 1), (3, 0), (3, 1)),
)


class Sums(nn.Module):
    """int32 sums as float32; the zero point is not 0, and none of the sums leaves what float32 holds."""

    def __init__(self, windows: Sequence[Any] = WINDOWS) -> None:
        super().__init__()
        self.windows = windows
        self.weights = nn.ParameterList(
            [frozen(codes(o, c, *taps, dtype=torch.int8, seed=c)) for c, o, taps, *_ in windows]
        )
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(131, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for weight, (channels, _, _, *given) in zip(self.weights, self.windows, strict=True):
            options: Any = dict(zip(("stride", "padding", "dilation"), map(list, given), strict=True))
            options["padding"] = [*options["padding"], *options["padding"]]
            operands = (x[:, :channels], self.one, self.zero, weight, self.one, None)
            found.append(qconv(*operands, *(None,) * 5, **options, **NUMBER))
        return tuple(found)


def summed(x: Tensor) -> list[Tensor]:
    """The same by PyTorch's convolution of whole numbers in float64, which is exact."""
    found = []
    for (channels, outputs, taps, stride, padding, dilation), weight in zip(WINDOWS, Sums().weights, strict=True):
        assert weight.shape == (outputs, channels, *taps)
        shifted = x[:, :channels].double() - 131
        found.append(F.conv2d(shifted, weight.double(), None, stride, padding, dilation).float())
    return found


def on_tiles(artifact: Artifact) -> int:
    """How many kernels there are; all of them multiply tiles."""
    (variant,) = artifact.manifest.variants
    found = [kernel for kernel in variant.kernels.values() if "conv" in kernel.rule]
    assert found and {kernel.rule for kernel in found} == {RULE}
    assert {kernel.configuration["products"] for kernel in found} <= {"tiles of uint8", "tiles of bfloat16"}
    return len(found)


def test_sums_of_every_window_are_exact() -> None:
    """Strides that part rows, runs of taps with tails, dilation, padding by a zero point, outputs that end."""
    x = codes(2, 130, 13, 17)
    artifact, program = compiled(Sums(), (x,), LEVEL)
    assert on_tiles(artifact) == len(WINDOWS)
    assert artifact.report["errors"]["main"] == 0
    for ours, exact in zip(program(x), summed(x), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 130, 4, 5), (1, 130, 40, 9), (3, 130, 6, 70)])
def test_sums_of_few_and_of_many_pixels(size: tuple[int, ...]) -> None:
    artifact, _ = compiled(Sums(), (codes(*size),), LEVEL)
    assert on_tiles(artifact) == len(WINDOWS) and artifact.report["errors"]["main"] == 0


def test_sums_of_sizes_known_at_run_time() -> None:
    """`compile` runs the artifact at several sizes."""
    shapes = {"x": {0: "batch", 2: "height", 3: "width"}}
    artifact, _ = compiled(Sums(WINDOWS[:4]), (codes(2, 130, 13, 17),), LEVEL, shapes)
    assert on_tiles(artifact) == 4 and artifact.report["errors"]["main"] == 0


@pytest.mark.slow
def test_epilogues_and_groups() -> None:
    """Groups stay with vectors."""
    artifact, _ = compiled(Images(), (codes(2, 512, 9, 11),), LEVEL)
    assert {RULE, "integer-convolution", "amx-gemm"} <= rules(artifact)


BRAIN = tuple(each for each in WINDOWS if each[0] % 2 == 0)


def brain(x: Tensor) -> Program:
    def case(weight: Tensor, channels: int, *given: Any) -> Any:
        return lambda x: F.conv2d(x[:, :channels].float(), weight.float(), None, *given)

    return capture(
        Cases({f"case{n}": case(narrow(o, c, *taps), c, *given) for n, (c, o, taps, *given) in enumerate(BRAIN)}), (x,)
    )


def test_bfloat16() -> None:
    artifact = graphopt.compile(brain(narrow(2, 130, 13, 17)), target=LEVEL, threads=2)
    assert on_tiles(artifact) == len(BRAIN) and artifact.report["errors"]["main"] < 3e-5


def test_nan_stays_in_its_windows() -> None:
    """Where channels do not fill a step, and beside the image, zeros are multiplied and not the neighbours."""
    weight, x = narrow(8, 20, 3, 3), narrow(1, 20, 9, 12)
    x[..., 0], x[0, 3, 4, 6] = torch.inf, torch.nan
    cut = {"cut": lambda x: F.conv2d(x[..., 1:].float(), weight.float(), padding=1)}
    artifact = graphopt.compile(capture(Cases(cut), (narrow(1, 20, 9, 12),)), target=LEVEL, threads=2)
    assert on_tiles(artifact) == 1
    (name,) = (each.name for each in artifact.session().get_inputs())
    (found,) = artifact.session().run(None, {name: array_of(x)})
    wrong = np.zeros((9, 11), bool)
    wrong[3:6, 4:7] = True
    np.testing.assert_array_equal(~np.isfinite(found[0]).all(0), wrong)


def test_every_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row and of all, shares of rows and of panels."""
    x = codes(2, 130, 13, 17)
    program = capture(Sums(WINDOWS[:4]), (x,))
    found = []
    for choice in (Configuration(1, 1, 2), Configuration(5, 2, 1), Configuration(50, 1, 1)):
        monkeypatch.setattr("graphopt.backends.rules.amx_convolution._candidates", lambda *_, c=choice: [c])
        artifact = graphopt.compile(program, target=LEVEL, threads=2)
        kernels = artifact.manifest.variants[0].kernels.values()
        assert {k.configuration["block_rows"] for k in kernels if k.rule == RULE} == {choice.block_rows}
        found.append(artifact.report["errors"]["main"])
    assert found == [0, 0, 0]


def test_what_is_offered() -> None:
    """Shares of rows where they are many, of panels where reading the weight takes longest."""
    target = resolve_target(LEVEL, 2)

    def first(height: int, channels: int, groups: int = 1, dtype: str = "uint8") -> Configuration | None:
        shape = (1, height, height, channels)
        strides = (height * height * channels, height * channels, channels, 1)
        storage: Any = type("Storage", (), {"dtype": dtype, "shape": shape})
        window = Window((3, 3), (1, 1), (1, 1), (1, 1))
        return next(iter(offered(target, View(storage, shape, strides), shape, window, groups)), None)

    assert first(56, 64) == Configuration(28, 2, 1)
    assert first(7, 512) == Configuration(7, 1, 2)
    assert first(56, 64, groups=2) is None and first(56, 64, dtype="float32") is None
    assert first(56, 8, dtype="bfloat16") is None  # pairs of vectors multiply fewer zeros
    assert offered(resolve_target("cpu:x86-64-v4", 2), View(None, (1,), (1,)), (1,), None, 1) == []  # type: ignore[arg-type]


def test_packing() -> None:
    """Runs of taps one after the other, each up to whole steps of zeros."""
    filters = codes(40, 20, 3, 2, dtype=torch.int8).numpy()
    filters[filters == 0] = 1
    packed = pack_filter_tiles(filters, Window((3, 2), (1, 1), (0, 0), (1, 1)), amx.CODES)
    assert packed.shape == (2, 3, 2, 16, 64)
    apart = pack_filter_tiles(filters, Window((3, 2), (1, 1), (0, 0), (1, 2)), amx.CODES)
    assert apart.shape == (2, 6, 2, 16, 64)
    for output, channel, row, column in ((0, 0, 0, 0), (39, 19, 2, 1), (17, 7, 1, 1)):
        for tiles, step, depth in (
            (packed, row, column * 20 + channel),
            (apart, row * 2 + column, channel),
        ):
            place = output // 32, step, output % 32 // 16, depth // 4, 4 * (output % 16) + depth % 4
            assert tiles[place] == filters[output, channel, row, column]
    assert np.count_nonzero(packed) == np.count_nonzero(apart) == filters.size
    brain = pack_filter_tiles(filters.astype(ml_dtypes.bfloat16), Window((3, 2), (1, 1), (0, 0), (1, 1)), amx.BRAIN)
    assert brain.shape == (2, 6, 2, 16, 32) and np.count_nonzero(brain) == filters.size


def test_geometry() -> None:
    """Rows of 14 outputs of 3 taps are 16 apart; a stride of 2 puts even rows before odd ones, of whole strides."""
    plain = Geometry.of((1, 14, 14, 8), Window((3, 3), (1, 1), (1, 1), (1, 1)), 14, 16)
    assert (plain.planes, plain.rows, plain.pitch, plain.wide, plain.pixels) == (1, 16, 16, 16, 13 * 16 + 14)
    strided = Geometry.of((1, 14, 14, 8), Window((3, 3), (2, 2), (1, 1), (1, 1)), 7, 16)
    assert (strided.planes, strided.rows, strided.pitch, strided.wide) == (2, 8, 15, 30)
    assert strided.words == 2 * 8 * 30 * 16


# Machine code ---------------------------------------------------------------------------------------------------------
def test_the_machine_code_gives_the_sums_of_the_reference(tmp_path: Path) -> None:
    """On the instructions themselves where the machine has them, else in the emulator."""
    emulated = {} if host_features() >= AMX else {"LD_PRELOAD": str(build_emulator(tmp_path))}
    x = codes(1, 130, 9, 10)
    program = capture(Sums(), (x,))
    artifact, _ = built(program)
    done, results = run_child(artifact, tmp_path, **emulated)
    assert done.returncode == 0, done.stdout + done.stderr
    (spec,) = program.inputs
    given = tensor_of(artifact.check[f"main.input.{spec.name}"], spec.dtype)
    with np.load(results) as found:
        for spec, exact in zip(program.outputs, summed(given), strict=True):
            np.testing.assert_array_equal(found[spec.name], exact.numpy())
