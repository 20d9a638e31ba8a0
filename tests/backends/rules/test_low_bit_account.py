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
    lowered = cpu.lower({"main": program}, resolve_target(target, threads=2))
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
        ("cpu:sapphirerapids", 1, 1, {}, "sums looked up with VPERMB and VPDPBUSD; "),
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
