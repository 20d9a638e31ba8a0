"""What is chosen for low-bit products: one packed weight for all entries, and workloads that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu
from graphopt.backends.choice import Settings, settings_of
from graphopt.backends.target import resolve_target
from graphopt.backends.tuner.record import Workload
from graphopt.capture import capture
from graphopt.program import Program
from tests.backends.rules.test_low_bit import Case, Products, activations, codes_of, frozen, powers

N, K = 4096, 64  # outputs for panels of any width
lut_build, lut_gemv, wq_gemm = (
    torch.ops.graphopt.lut_build,
    torch.ops.graphopt.lut_gemv,
    torch.ops.graphopt.wq_gemm,
)


class Entry(nn.Module):
    """One product of a weight [N, K]."""

    def __init__(
        self, held: tuple[nn.Parameter, nn.Parameter], bits: int, options: Mapping[str, str], many: bool
    ) -> None:
        super().__init__()
        self.weight, self.scale = held
        self.bits, self.options, self.many = bits, options, many

    def forward(self, x: Tensor) -> Tensor:
        built = lut_build(x, K, self.options.get("table", "exact"))
        operator = wq_gemm if self.many else lut_gemv
        result: Tensor = operator(*built, self.weight, self.scale, None, None, None, self.bits, K, **self.options)
        return result


def entries(bits: int, rows: int, **step: str) -> dict[str, Program]:
    """A prefill of `rows`, then a step of one as `step` says, which share a weight."""
    held = frozen(codes_of(bits, N, K)), frozen(powers(N, 1))
    return {
        "prefill": capture(Entry(held, bits, {}, True), (torch.randn(rows, K),)),
        "step": capture(Entry(held, bits, step, False), (torch.randn(1, K),)),
    }


def packed(lowered: cpu.Module) -> list[str]:
    """The weights among what is packed."""
    return [name for name, array in lowered.weights.items() if array.dtype == "uint8" and array.size >= N * K // 8]


def made_of(lowered: cpu.Module) -> set[str]:
    return {str(info.configuration["products"]) for info in lowered.kernels.values() if info.rule == "low-bit"}


@pytest.mark.parametrize("bits, step", [(2, {"table": "int8"}), (2, {"kernel": "lut"}), (3, {"kernel": "unpack"})])
def test_entries_share_a_packed_weight_of_any_width(bits: int, step: dict[str, str]) -> None:
    """Also where another width measured best for one of them."""
    programs, target = entries(bits, 16, **step), resolve_target("cpu:sapphirerapids", threads=2)
    lowered = cpu.lower(programs, target)
    assert len(packed(lowered)) == 1, packed(lowered)
    first = next(site.made.choice for site in lowered.choices.sites if site.made.choice.workload.rule == "low-bit")
    other = next(each for each in first.space() if each.vectors != first.default.vectors)

    def tuned(workload: Workload) -> Settings | None:
        return settings_of(other) if workload == first.workload else None

    again = cpu.lower(programs, target, tuned)
    widths = {info.configuration["vectors"] for info in again.kernels.values() if info.rule == "low-bit"}
    assert len(packed(again)) == 1 and widths == {other.vectors}


@pytest.mark.parametrize("rows, products", [(3, {"sums looked up"}), (64, {"sums looked up", "bits taken apart"})])
def test_a_weight_packed_for_look_ups_serves_few_rows(rows: int, products: set[str]) -> None:
    """Many rows take it apart where that takes fewer instructions, out of a copy of its own."""
    lowered = cpu.lower(entries(2, rows, kernel="lut"), resolve_target("cpu:x86-64-v3-vnni", threads=2))
    assert made_of(lowered) == products and len(packed(lowered)) == len(products)


def test_workloads_say_what_products_are_made_of() -> None:
    every: list[tuple[int, Case, dict[str, Any]]] = [
        *((1, Case(1, 48, 256, 128), options) for options in ({}, {"table": "int8"})),
        *((1, Case(1, 48, 256, 128), {"kernel": kernel}) for kernel in ("lut", "unpack", "amx")),
        (1, Case(1, 48, 256, 128, book=1), {}),
        *((3, Case(1, 48, 256, 128), options) for options in ({}, {"kernel": "lut"})),
    ]
    found = set()
    for rows, case, options in every:
        program = capture(Products([case], **options), (activations(rows, 256),))
        lowered = cpu.lower({"main": program}, resolve_target("cpu:sapphirerapids", threads=2))
        found |= {site.made.choice.workload.key for site in lowered.choices.sites}
    assert len(found) == len(every), found
