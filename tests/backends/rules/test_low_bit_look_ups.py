"""Sums of activations that are looked up in one table at a time: bit for bit those that are specified."""

from __future__ import annotations

import pytest

from graphopt.arrays import array_of, tensor_of
from graphopt.compile import Artifact
from tests.backends.rules.test_low_bit import TAILS, Case, Products, activations, compiled

LOOKED_UP = "sums looked up"
NARROW = [  # levels without an instruction that looks up in four tables
    "cpu:x86-64-v3",
    "cpu:x86-64-v3-vnni",
    "cpu:x86-64-v4",
    "cpu:x86-64-v4-bf16",
]
FEW = [
    Case(1, 37, 100, 16, "half", bias=True),
    Case(3, 5, 96, 24, "int"),
    Case(2, 130, 72, 128),
    Case(4, 16, 200, 200, extreme=True),
]
EXACT = [
    *(Case(bits, 37, 100, 16, "half", bias=True) for bits in (1, 2, 3)),
    *(Case(bits, 130, 70, 128, "same") for bits in (1, 2, 3)),
    *(Case(bits, 5, 96, 24, "int") for bits in (1, 2, 3)),
    *(Case(bits, 70, 256, 256, extreme=True) for bits in (1, 3)),
    Case(1, 1, 1, 1),
]
ROUNDED = [
    *(Case(bits, 37, 100, 16, "half", bias=True) for bits in range(1, 9)),
    *(Case(bits, 130, 70, 128, "same") for bits in (1, 4)),
    *(Case(bits, 5, 96, 24, "int") for bits in (2, 3, 8)),
    *(Case(bits, 70, 256, 256, extreme=True) for bits in (1, 3, 8)),
    Case(1, 1, 1, 4),
]


def products_of(artifact: Artifact) -> set[str]:
    kernels = artifact.manifest.variants[0].kernels.values()
    return {str(info.configuration["products"]) for info in kernels if info.rule == "low-bit"}


@pytest.mark.parametrize("option", [{"kernel": "lut"}, {"table": "int8"}])
def test_tails_of_what_is_looked_up(option: dict[str, str]) -> None:
    cases = FEW[:3] if "kernel" in option else FEW
    artifact, _ = compiled(Products(cases, **option), activations(3, 256), "cpu:x86-64-v3")
    assert products_of(artifact) == {LOOKED_UP}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("target", NARROW)
def test_every_tail_of_what_is_looked_up(target: str, rows: int) -> None:
    for cases, option in ((EXACT, {"kernel": "lut"}), (ROUNDED, {"table": "int8"})):
        artifact, _ = compiled(Products(cases, **option), activations(rows, 256), target)
        assert products_of(artifact) == {LOOKED_UP}


@pytest.mark.slow
@pytest.mark.parametrize("target", NARROW)
def test_every_tail_of_what_could_be_looked_up(target: str) -> None:
    cases = [case for case in TAILS if case.bits <= 3 and not case.book]
    artifact, _ = compiled(Products(cases, kernel="unpack"), activations(1, 256), target)
    assert products_of(artifact) == {"bits taken apart"}


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"kernel": "lut"}, {"table": "int8"}])
def test_sums_that_do_not_fit_16_bits(option: dict[str, str]) -> None:
    """The furthest ones: 2304 / 4 entries of 127."""
    cases = [Case(bits, 33, 2304, 2304, extreme=True) for bits in (1, 3)]
    x = activations(2, 2304)
    x[0], x[1] = 127, -127
    artifact, _ = compiled(Products(cases, **option), x, "cpu:x86-64-v3")
    assert products_of(artifact) == {LOOKED_UP}


@pytest.mark.slow
def test_any_number_of_rows_is_looked_up() -> None:
    for option in ({"kernel": "lut"}, {"table": "int8"}):
        artifact, program = compiled(Products(FEW[:3], **option), activations(2, 256), "cpu:x86-64-v3", {"x": {0: "n"}})
        session = artifact.session()
        for rows in (1, 4, 9):
            x = activations(rows, 256)
            results = session.run(None, {"x": array_of(x)})
            for spec, array, want in zip(program.outputs, results, program(x), strict=True):
                assert tensor_of(array, spec.dtype).equal(want), (rows, spec.name)
