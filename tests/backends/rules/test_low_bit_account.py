"""What the manifest says of low-bit products: which instructions make them and why, and what is slow."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.runtime.manifest import KernelInfo
from tests.backends.rules.test_low_bit import Case, Products, activations


def kernels(target: str, cases: list[Case], rows: int = 1, **options: Any) -> list[KernelInfo]:
    """Of each case; nothing is compiled."""
    program = capture(Products(cases, **options), (activations(rows, 256),))
    return of_low_bits(cpu.lower({"main": program}, resolve_target(target, threads=2)))


def of_low_bits(lowered: cpu.Module) -> list[KernelInfo]:
    return [info for info in lowered.kernels.values() if info.rule == "low-bit"]


@pytest.mark.parametrize(
    "target, bits, rows, options, why",
    [
        ("cpu:x86-64-v3", 1, 1, {}, "sums looked up with VPSHUFB and VPMADDUBSW; 2.2 instructions a vector of weights"),
        (
            "cpu:x86-64-v3",
            2,
            9,
            {},
            "bits taken apart with VPMADDUBSW; 4.5 instructions a vector of weights looked up, 3.2",
        ),
        ("cpu:x86-64-v3", 4, 1, {}, "bits taken apart with VPMADDUBSW; 4 bits are over the 3"),
        ("cpu:x86-64-v3", 4, 1, {"table": "int8"}, "sums looked up with VPSHUFB and VPMADDUBSW; table=int8 has tables"),
        ("cpu:x86-64-v3", 1, 1, {"kernel": "unpack"}, "bits taken apart with VPMADDUBSW; kernel=unpack asks for it"),
        ("cpu:aarch64", 2, 1, {}, "sums looked up with TBL and SADDL; 3.0 instructions"),
        ("cpu:aarch64", 4, 1, {}, "bits taken apart with SMULL; 4 bits"),
        ("cpu:cortex-a78ae", 1, 1, {}, "sums looked up with TBL and SADDL; 1.5 instructions"),
        ("cpu:cortex-a78ae", 3, 1, {}, "bits taken apart with SDOT; 4.5 instructions"),
        ("cpu:armv8.6-a", 8, 1, {}, "bits taken apart with USDOT; 8 bits"),
        ("cpu:x86-64-v4-vnni", 4, 1, {}, "bits taken apart with VPDPBUSD; 4 bits"),
        ("cpu:sapphirerapids", 1, 1, {}, "sums looked up with VPERMB and VPDPBUSD; looking one bit up takes fewest"),
        ("cpu:sapphirerapids", 1, 3, {}, "bits taken apart with VPDPBUSD; several rows share what is taken apart"),
        ("cpu:sapphirerapids", 2, 33, {}, "tiles of int8 with TDPBSUD; several rows share what is taken apart"),
        ("cpu:sapphirerapids", 2, 5, {"kernel": "lut"}, "bits taken apart with VPDPBUSD; kernel=lut is for up to 4"),
        ("cpu:sapphirerapids", 4, 33, {}, "tiles of int8 with TDPBSUD; 4 bits"),
    ],
)
def test_which_instructions_and_why(target: str, bits: int, rows: int, options: dict[str, str], why: str) -> None:
    (kernel,) = kernels(target, [Case(bits, 48, 256, 128)], rows, **options)
    assert str(kernel.configuration["why"]).startswith(f"{bits} bit{'s' * (bits > 1)}: {why}"), kernel.configuration[
        "why"
    ]


def test_codebooks_are_said_to_have_no_tables() -> None:
    (kernel,) = kernels("cpu:x86-64-v3", [Case(4, 48, 256, 128, book=1)])
    assert str(kernel.configuration["why"]).endswith("numbers of codebooks have no tables")


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:sapphirerapids", "cpu:aarch64"])
def test_tails_and_small_groups_are_not_slow(target: str) -> None:
    cases = [Case(bits, 255, 250, group) for bits in (1, 3, 8) for group in (16, 24, 128)]
    assert [kernel.slow for kernel in kernels(target, cases)] == [None] * len(cases)


def test_what_is_slow_is_counted() -> None:
    few, short, book = Case(4, 3, 256, 128), Case(1, 64, 256, 4), Case(8, 64, 256, 128, book=1)
    one, other, third = (kernel.slow for kernel in kernels("cpu:x86-64-v3", [few, short, book]))
    assert one == "5.3 times the numbers of the weight: 3 outputs fill panels of 16, groups of 128 fill 128"
    assert other is not None and other.startswith("4.0 times") and other.endswith("groups of 4 fill 16")
    assert third == "the 256 numbers of codebooks are loaded one by one"
    assert kernels("cpu:aarch64", [book])[0].slow is None


@pytest.mark.parametrize(
    "bits, options, products",
    [
        (1, {}, "sums looked up; bits taken apart; tiles of int8"),
        (4, {}, "bits taken apart; tiles of int8"),
        (1, {"kernel": "lut"}, "sums looked up; tiles of int8"),
        (4, {"kernel": "unpack"}, "bits taken apart"),
        (4, {"kernel": "amx"}, "tiles of int8"),
    ],
)
def test_an_open_number_of_rows_is_made_of_all_that_serve_some(
    bits: int, options: dict[str, str], products: str
) -> None:
    program = capture(
        Products([Case(bits, 48, 256, 128)], **options), (activations(3, 256),), dynamic_shapes={"x": {0: "rows"}}
    )
    (kernel,) = of_low_bits(cpu.lower({"main": program}, resolve_target("cpu:sapphirerapids", threads=2)))
    assert kernel.configuration["products"] == products
