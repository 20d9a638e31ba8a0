"""Low-bit products on every level: int32 sums bit for bit, for every number of bits, group and tail.

Scales are powers of two, with which float32 sums are exact too. `compile` checks every case: code for another machine
runs here with the same sums made of other instructions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends.target import LEVELS
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.errors import CompileError
from graphopt.operators import low_bit  # noqa: F401

lut_build, lut_gemv, wq_gemm = (
    torch.ops.graphopt.lut_build,
    torch.ops.graphopt.lut_gemv,
    torch.ops.graphopt.wq_gemm,
)
KINDS = [
    "cpu:x86-64-v3",
    "cpu:x86-64-v3-vnni",
    "cpu:x86-64-v4",
    "cpu:x86-64-v4-bf16",
    "cpu:aarch64",
    "cpu:cortex-a78ae",
]


def codes_of(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def powers(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 ** torch.randint(-2, 2, shape, generator=torch.Generator().manual_seed(seed))


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, False)


@dataclass(frozen=True)
class Case:
    bits: int
    n: int
    k: int
    group: int
    zero: str | None = None
    bias: bool = False
    book: int = 0  # how many codebooks
    extreme: bool = False


class Products(nn.Module):
    """Each case with weights of its own; codes of activations are given, so that the sums alone are compared."""

    def __init__(self, cases: list[Case], **options: Any) -> None:
        super().__init__()
        self.cases, self.options = cases, options
        for number, case in enumerate(cases):
            groups = -(-case.k // case.group)
            weight = codes_of(case.bits, case.n, case.k, seed=number)
            if case.extreme:
                weight = torch.full_like(weight, 2**case.bits - 1)
            self.register_parameter(f"weight{number}", frozen(weight))
            self.register_parameter(f"scale{number}", frozen(powers(case.n, groups, seed=number + 1)))
            zero = codes_of(case.bits, case.n, groups, seed=number + 2).float()
            if case.zero is not None:
                zero = {"int": zero, "half": zero + 0.5, "same": torch.full_like(zero, 1.5)}[case.zero]
                self.register_parameter(f"zero{number}", frozen(zero))
            if case.bias:
                self.register_parameter(f"bias{number}", frozen(powers(case.n, seed=3)))
            if case.book:
                book = codes_of(8, case.book, 2**case.bits).int().sub(128).to(torch.int8)
                self.register_parameter(f"book{number}", frozen(book[0] if case.book == 1 else book))
            if case.book > 1:
                tag = (codes_of(8, case.n, groups, seed=5) % case.book).to(torch.uint8)
                self.register_parameter(f"tag{number}", frozen(tag))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        few = self.options.get("kernel") == "lut" or "table" in self.options
        for number, case in enumerate(self.cases):
            codes, scale, sums = lut_build(x[..., : case.k], case.group, self.options.get("table", "exact"))
            held = dict(self._parameters)
            given = [held.get(f"{name}{number}") for name in ("weight", "scale", "zero", "book", "bias")]
            operator = wq_gemm if number % 2 and not few else lut_gemv
            unit = torch.ones_like(scale)
            found[f"case{number}"] = operator(
                codes,
                unit,
                sums.round() if "table" in self.options else sums,
                *given,
                case.bits,
                case.group,
                tag=held.get(f"tag{number}"),
                **self.options,
            )
        return found


def activations(*shape: int) -> Tensor:
    x = (codes_of(8, *shape, seed=9).float() - 128).clamp(-127, 127)
    x[..., ::4] = torch.where(x[..., ::4] < 0, -127.0, 127.0)
    return x


def compiled(module: nn.Module, x: Tensor, target: str, dynamic: Any = None) -> tuple[Artifact, Any]:
    """The artifact and its program; compiling has compared their results."""
    program = capture(module, (x,), dynamic_shapes=dynamic)
    artifact = graphopt.compile(program, target=target, threads=2)
    assert artifact.report["errors"]["main"] == 0
    return artifact, program


def rules(artifact: Artifact) -> set[str]:
    return {kernel.rule for kernel in artifact.manifest.variants[0].kernels.values()}


FEW_TAILS = [
    Case(1, 37, 100, 16, "half", bias=True),
    Case(2, 130, 70, 128),
    Case(3, 48, 256, 64, "int"),
    Case(3, 5, 96, 24, "half"),
    Case(4, 16, 256, 32, "same"),
    Case(4, 40, 128, 32, "half", book=4),
    Case(7, 37, 100, 16, "half"),
    Case(8, 33, 256, 256, extreme=True),
]
TAILS = [
    *FEW_TAILS,
    *(Case(bits, 48, 256, 64, "int") for bits in (1, 2, 4, 5, 6, 7, 8)),
    *(Case(bits, 37, 100, 16, "half", bias=True) for bits in (2, 3, 4, 5, 6, 8)),
    *(Case(bits, 130, 70, 128) for bits in (1, 3, 4, 8)),
    *(Case(bits, 16, 256, 32, "same") for bits in (1, 2, 3)),
    *(Case(bits, 5, 96, 24, "half") for bits in (1, 4)),
    Case(4, 1, 1, 1),
    *(Case(bits, 40, 128, 32, book=1) for bits in (2, 3, 4, 8)),
    *(Case(bits, 40, 128, 32, "half", book=4) for bits in (3, 5)),
    *(Case(bits, 33, 256, 256, extreme=True) for bits in (1, 2, 3, 4)),
]


@pytest.mark.parametrize("target, rows", [("cpu", 1), ("cpu", 33), ("cpu:x86-64-v3", 3), ("cpu:x86-64-v3-vnni", 1)])
def test_tails_of_outputs_depth_and_groups(target: str, rows: int) -> None:
    artifact, _ = compiled(Products(FEW_TAILS), activations(rows, 256), target)
    assert rules(artifact) >= {"low-bit", "low-bit-build"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", *KINDS])
@pytest.mark.parametrize("rows", [3, 33])
def test_every_tail_of_outputs_depth_and_groups(target: str, rows: int) -> None:
    artifact, _ = compiled(Products(TAILS), activations(rows, 256), target)
    assert rules(artifact) >= {"low-bit", "low-bit-build"}


def test_one_kernel_for_any_number_of_rows() -> None:
    artifact, program = compiled(Products(FEW_TAILS[:3]), activations(2, 256), "cpu", {"x": {0: "rows"}})
    session = artifact.session()
    for rows in (1, 2, 4, 5, 16, 17, 33, 130):
        x = activations(rows, 256)
        wanted = program(x)
        for spec, array, want in zip(program.outputs, session.run(None, {"x": array_of(x)}), wanted, strict=True):
            assert torch.equal(tensor_of(array, spec.dtype), want), (rows, spec.name)


def test_a_kernel_that_is_asked_for_is_taken() -> None:
    case, x = [Case(4, 48, 256, 64, "int"), Case(3, 40, 96, 32)], activations(9, 256)
    for kernel, products in (("unpack", "bits taken apart"), ("amx", "tiles of int8")):
        artifact, _ = compiled(Products(case, kernel=kernel), x, "cpu:sapphirerapids")
        kernels = artifact.manifest.variants[0].kernels.values()
        assert {info.configuration["products"] for info in kernels if info.rule == "low-bit"} == {products}
    with pytest.raises(CompileError, match="use 'auto'"):
        compiled(Products(case, kernel="amx"), x, "cpu:x86-64-v3")


class Deep(nn.Module):
    """The largest sums that int32 has to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(frozen(torch.full((3, 65536), 2**b - 1, dtype=torch.uint8)) for b in (4, 8))
        self.register_buffer("one", torch.ones(3, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        built = lut_build(x, 65536)
        return tuple(
            lut_gemv(built[0], torch.ones_like(built[1]), built[2], weight, self.one, None, None, None, bits, 65536)
            for weight, bits in zip(self.weights, (4, 8), strict=True)
        )


@pytest.mark.parametrize("target", ["cpu", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)])
def test_sums_do_not_saturate(target: str) -> None:
    for rows in (1, 2, 9):
        _, program = compiled(Deep(), torch.full((rows, 65536), -3.5), target)
        found = [set(each.flatten().tolist()) for each in program(torch.full((rows, 65536), -3.5))]
        assert found == [{-127.0 * (2**bits - 1) * 65536} for bits in (4, 8)]


class Builds(nn.Module):
    GROUPS: Mapping[int, int] = {64: 16, 70: 32, 100: 100, 37: 5, 1: 1, 256: 128, 255: 64}

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> list[Tensor]:
        groups = {k: group for k, group in self.GROUPS.items() if self.table == "exact" or group % 4 == 0}
        return [each for k, group in groups.items() for each in lut_build(x[..., :k], group, self.table)]


@pytest.mark.parametrize("table", ["exact", "int8"])
@pytest.mark.parametrize("target", ["cpu", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)])
def test_codes_and_tables_of_activations(table: str, target: str) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)
    x[2] = 0
    x[3] = torch.arange(256) / 2 - 64
    program = capture(Builds(table), (x,))
    artifact = graphopt.compile(program, target=target, threads=2)
    assert "low-bit-build" in rules(artifact)
    if target != "cpu":  # compiling has compared them
        return
    for spec, array, want in zip(
        program.outputs, artifact.session().run(None, {"x": array_of(x)}), program(x), strict=True
    ):
        found = tensor_of(array, spec.dtype)
        if want.is_floating_point():
            assert torch.allclose(found, want, rtol=1e-5, atol=1e-5), spec.name
        else:
            assert torch.equal(found, want), spec.name


@pytest.mark.parametrize("table, width", [("exact", 256), ("exact", 37), ("int8", 256), ("int8", 40)])
@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_scales_say_that_a_number_is_none(table: str, width: int, target: str) -> None:
    """One group, with NaN or an infinity at every position in turn; then with both."""

    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale: Tensor = lut_build(x, width, table)[1]
            return scale

    every = torch.eye(width, dtype=torch.bool)
    rows = [torch.ones(width, width).masked_fill(every, value) for value in (math.nan, -math.nan, math.inf, -math.inf)]
    infinite = torch.full((width, width), -math.inf)
    x = torch.cat([*rows, infinite.masked_fill(every, math.nan), infinite])
    program = capture(Scales(), (torch.ones_like(x),))
    artifact = graphopt.compile(program, target=target, threads=2)
    (found,) = artifact.session().run(None, {"x": x.numpy()})
    (wanted,) = program(x)
    assert torch.equal(torch.from_numpy(found).nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    assert int(wanted.isnan().sum()) == 6 * width


def test_codebooks_beyond_what_kernels_look_up_are_refused() -> None:
    compiled(Products([Case(4, 5, 64, 32, book=16)]), activations(1, 64), "cpu")
    with pytest.raises(CompileError, match=r"17 codebooks of 16 numbers.*at most 16"):
        compiled(Products([Case(4, 5, 64, 32, book=17)]), activations(1, 64), "cpu")


def test_codes_take_their_bits_in_the_artifact() -> None:
    artifact, _ = compiled(Products([Case(bits, 64, 1024, 128) for bits in (1, 2, 3, 4)]), activations(1, 1024), "cpu")
    sizes = [each.size for name, each in artifact.weights.items() if "weight" in name]
    assert sorted(sizes) == [64 * 1024 * bits // 8 for bits in (1, 2, 3, 4)]


assert set(KINDS) <= set(LEVELS)
