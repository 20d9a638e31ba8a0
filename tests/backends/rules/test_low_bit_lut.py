"""Sums of activations looked up: the int32 ones of codes bit for bit, those of tables of bytes as their entries say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends import cpu
from graphopt.backends.target import resolve_target, runnable
from graphopt.capture import capture
from graphopt.compile import Artifact, _trial
from graphopt.operators import low_bit  # noqa: F401
from graphopt.runtime.features import missing
from tests.backends.rules.test_low_bit import Case, Products, activations, codes_of, compiled, frozen, powers

lut_build, lut_gemv, wq_gemm = (
    torch.ops.graphopt.lut_build,
    torch.ops.graphopt.lut_gemv,
    torch.ops.graphopt.wq_gemm,
)
TARGET = "cpu:sapphirerapids"  # elsewhere the same kernels, of other instructions
FEW = [Case(1, 37, 100, 16, "half", bias=True), Case(2, 130, 72, 128), Case(3, 37, 256, 64, "int", extreme=True)]
MANY = [
    *FEW,
    Case(1, 130, 70, 128),
    Case(1, 33, 256, 256, extreme=True),
    Case(1, 5, 96, 24, "half"),
    Case(2, 130, 256, 32, "same"),
    Case(2, 16, 200, 64),
    Case(3, 37, 256, 128, "int", bias=True),
    Case(3, 70, 72, 16, extreme=True),
]
WIDE = [Case(4, 40, 256, 128, "half", bias=True), Case(5, 17, 100, 20), Case(8, 33, 64, 64, extreme=True)]
slow = pytest.mark.slow


def made_of(artifact: Artifact) -> set[Any]:
    kernels = artifact.manifest.variants[0].kernels.values()
    return {info.configuration["products"] for info in kernels if info.rule == "low-bit"}


class Few(Products):
    """All cases by `lut_gemv`."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for number, case in enumerate(self.cases):
            table = self.options.get("table", "exact")
            codes, scale, sums = lut_build(x[..., : case.k], case.group, table)
            given = [self._parameters.get(f"{name}{number}") for name in ("weight", "scale", "zero", "book", "bias")]
            found[f"case{number}"] = lut_gemv(
                codes, torch.ones_like(scale), sums, *given, case.bits, case.group, **self.options
            )
        return found


@pytest.mark.parametrize(
    ("rows", "cases"), [(1, FEW), pytest.param(1, MANY, marks=slow), pytest.param(4, MANY, marks=slow)]
)
def test_exact_sums(rows: int, cases: list[Case]) -> None:
    artifact, _ = compiled(Few(cases, kernel="lut"), activations(rows, 256), TARGET)
    assert made_of(artifact) == {"sums looked up"}


@pytest.mark.parametrize(
    ("kernel", "products"),
    [
        ("lut", "sums looked up; tiles of int8"),
        pytest.param("auto", "sums looked up; bits taken apart; tiles of int8", marks=slow),
    ],
)
def test_exact_sums_of_any_number_of_rows(kernel: str, products: str) -> None:
    artifact, program = compiled(Few(FEW[:1], kernel=kernel), activations(2, 256), TARGET, {"x": {0: "rows"}})
    assert made_of(artifact) == {products}
    session = artifact.session()
    for rows in (1, 3, 4, 5, 17):
        x = activations(rows, 256)
        (found,), (want,) = session.run(None, {"x": array_of(x)}), program(x)
        assert torch.equal(tensor_of(found, want.dtype), want), rows


def test_one_bit_is_looked_up_unless_told_otherwise() -> None:
    one, two = Case(1, 64, 256, 128), Case(2, 64, 256, 128)
    for case, kernel, products in (
        (one, "auto", "sums looked up"),
        (one, "unpack", "bits taken apart"),
        (two, "auto", "bits taken apart"),
    ):
        assert made_of(compiled(Few([case], kernel=kernel), activations(1, 256), TARGET)[0]) == {products}


@pytest.mark.parametrize(
    ("rows", "cases"),
    [(3, [*FEW, WIDE[1]]), pytest.param(1, [*MANY, *WIDE], marks=slow), pytest.param(3, [*MANY, *WIDE], marks=slow)],
)
def test_sums_of_tables(rows: int, cases: list[Case]) -> None:
    """With scales of one and whole activations every step is exact."""
    program = capture(Few(cases, table="int8"), (activations(rows, 256),))
    artifact = graphopt.compile(program, target=TARGET, threads=2)
    assert made_of(artifact) == {"sums looked up"}
    x = activations(rows, 256).flip(-1)
    for found, want in zip(artifact.session().run(None, {"x": array_of(x)}), program(x), strict=True):
        assert torch.equal(tensor_of(found, want.dtype), want)


def test_sums_of_tables_are_those_of_whole_numbers() -> None:
    """Beside sums of int64, with nothing of the operators' own reference."""
    n, k, group, bits = 40, 96, 32, 2

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = frozen(codes_of(bits, n, k)), frozen(torch.ones(n, k // group))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            built = lut_build(x, group, "int8")
            unit = torch.ones_like(built[1])
            nothing = torch.zeros_like(built[2])
            return built[0], lut_gemv(built[0], unit, nothing, self.weight, self.scale, None, None, None, bits, group,
                                      "int8")  # fmt: skip

    module, x = Looked(), torch.randn(1, k, generator=torch.Generator().manual_seed(0))
    tables, found = (
        graphopt.compile(capture(module, (x,)), target=TARGET, threads=2).session().run(None, {"x": x.numpy()})
    )
    entries, wanted = tables[0].astype(np.int64), np.zeros(n, np.int64)
    assert np.array_equal(entries, -entries[:, ::-1])
    codes = module.weight.numpy().reshape(n, -1, 4)
    for bit in range(bits):
        chosen = ((codes >> bit & 1) << np.arange(4)).sum(-1)
        wanted += (1 << bit) * np.take_along_axis(entries[None], chosen[..., None], 2)[..., 0].sum(-1)
    assert np.array_equal(found[0] * 2, wanted)


def nmse(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("bits", [pytest.param(1, marks=slow), 2])
def test_tables_err_as_much_as_codes_zeros_are_zero_and_infinities_no_numbers(bits: int) -> None:
    n, k, group = 64, 512, 128
    weight = codes_of(bits, n, k)
    zero = (2**bits - 1) / 2

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = frozen(weight), frozen(powers(n, k // group))
            self.zero = frozen(torch.full((n, k // group), zero))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            given = self.weight, self.scale, self.zero, None, None, bits, group
            return tuple(lut_gemv(*lut_build(x, group, table), *given, table) for table in ("exact", "int8"))

    module = Both()
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(1))
    session = graphopt.compile(capture(module, (x,)), target=TARGET, threads=2).session()
    steps = module.scale.double().repeat_interleave(group, 1)
    wanted = (x.double() @ (steps * (weight.double() - zero)).t()).numpy()
    exact, tables = (nmse(found, wanted) for found in session.run(None, {"x": x.numpy()}))
    assert 0 < tables <= 2 * exact and tables < 1e-3
    assert not any(found.any() for found in session.run(None, {"x": np.zeros((2, k), np.float32)}))
    x[0, 7], x[1, k - 1] = torch.inf, -torch.inf
    assert all(np.isnan(found).all() for found in session.run(None, {"x": x.numpy()}))


def test_one_row_and_many_share_a_packed_weight() -> None:
    n, k, group, bits = 64, 512, 128, 3
    weight, scale = frozen(codes_of(bits, n, k)), frozen(powers(n, k // group))

    class Entry(nn.Module):
        def __init__(self, table: str) -> None:
            super().__init__()
            self.table, self.weight, self.scale = table, weight, scale

        def forward(self, x: Tensor) -> Tensor:
            built = lut_build(x, group, self.table)
            operator = lut_gemv if self.table == "int8" else wq_gemm
            result: Tensor = operator(*built, self.weight, self.scale, None, None, None, bits, group, self.table)
            return result

    programs = {
        "prefill": capture(Entry("exact"), (torch.randn(16, k),)),
        "step": capture(Entry("int8"), (torch.randn(1, k),)),
        "several": capture(Entry("exact"), (torch.randn(3, k),)),
    }
    artifact = graphopt.compile(programs, target=TARGET, threads=2)
    assert sorted(each.nbytes for each in artifact.weights.values()) == sorted((n * k * bits // 8, 2 * scale.numel()))
    assert max(artifact.report["errors"].values()) < 1e-5


def test_the_instruction_and_its_stand_in_find_the_same() -> None:
    """Other CPUs check a kernel with entries that are taken one by one."""
    target = resolve_target(TARGET, 2)
    if missing(target.features):
        pytest.skip(f"this CPU lacks {', '.join(missing(target.features))}, so the instruction cannot be run")
    program = capture(Few(FEW[:1], kernel="lut"), (activations(1, 256),))
    artifact = graphopt.compile(program, target=TARGET, threads=2)
    stand_in = replace(runnable(target), extensions=())
    other = _trial(artifact, cpu.build(cpu.lower({"main": program}, target).module, stand_in))
    feed = {"x": activations(1, 256).numpy()}
    own, theirs = artifact.session().run(None, feed), other.session().run(None, feed)
    assert own[0].any() and np.array_equal(own[0], theirs[0])
