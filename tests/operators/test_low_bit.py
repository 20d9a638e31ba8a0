"""graphopt::lut_build, lut_gemv and wq_gemm: sums of brute force, the identity of bit planes, the error of tables."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators import low_bit  # noqa: F401

lut_build, lut_gemv, wq_gemm = (
    torch.ops.graphopt.lut_build,
    torch.ops.graphopt.lut_gemv,
    torch.ops.graphopt.wq_gemm,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def powers(*shape: int, seed: int = 0) -> Tensor:
    """Powers of two, with which float32 sums are exact."""
    return 2.0 ** torch.randint(-2, 2, shape, generator=torch.Generator().manual_seed(seed))


def weight_of(weight: Tensor, scale: Tensor, zero: Tensor | None, group: int, values: Tensor | None = None) -> Tensor:
    """[N, K] in float64."""

    def spread(each: Tensor) -> Tensor:
        return each.double().repeat_interleave(group, 1)[:, : weight.shape[1]]

    whole = weight.double() if values is None else values.double()
    return spread(scale) * (whole if zero is None else whole - spread(zero))


def test_codes_of_activations() -> None:
    x = torch.tensor([[3.0, -1.5, 0.75, 127.0, 0.0, 0.0, 0.0, 0.0, 2.0, 254.0]])
    codes, scale, sums = lut_build(x, 4)
    assert codes.tolist() == [[3, -2, 1, 127, 0, 0, 0, 0, 1, 127]]
    assert scale.tolist() == [[1.0, 0.0, 2.0]] and sums.tolist() == [[129, 0, 128]]
    assert (codes.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)


@pytest.mark.parametrize("k, group", [(64, 16), (70, 32), (96, 96), (40, 64), (1, 1), (37, 5)])
def test_codes_are_the_nearest(k: int, group: int) -> None:
    x = numbers(2, 3, k) * torch.logspace(-3, 3, k)
    codes, scale, sums = lut_build(x, group)
    groups = -(-k // group)
    assert codes.shape == (2, 3, k) and scale.shape == sums.shape == (2, 3, groups)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        step = scale[..., g].numpy()[..., None]
        assert np.array_equal(scale[..., g].numpy(), np.abs(x[..., part].numpy()).max(-1) / np.float32(127))
        assert np.array_equal(codes[..., part].numpy(), np.rint(x[..., part].numpy() / step).astype(np.int8))
        assert torch.equal(sums[..., g], codes[..., part].int().sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [None, "int", "float"])
@pytest.mark.parametrize("k, group", [(64, 16), (100, 32), (48, 48)])
def test_products_are_those_of_the_numbers(bits: int, zero: str | None, k: int, group: int) -> None:
    n, groups = 5, -(-k // group)
    weight, steps = codes_of(bits, n, k), powers(n, groups)
    zeros = None if zero is None else codes_of(bits, n, groups, seed=1).float() + (0.5 if zero == "float" else 0.0)
    x = (codes_of(8, 3, k, seed=2).float() - 128).clamp(-127, 127)
    x[:, ::group] = 127.0
    x = x * powers(3, groups, seed=3).repeat_interleave(group, 1)[:, :k]
    codes, scale, sums = lut_build(x, group)
    bias = powers(n, seed=4)
    taken = codes.double() * scale.double().repeat_interleave(group, -1)[:, :k]
    wanted = taken @ weight_of(weight, steps, zeros, group).t() + bias.double()
    for operator in (lut_gemv, wq_gemm):
        found = operator(codes, scale, sums, weight, steps, zeros, None, bias, bits, group)
        assert found.dtype == torch.float32 and torch.equal(found.double(), wanted)


@pytest.mark.parametrize("tagged", [False, True])
def test_codebooks(tagged: bool) -> None:
    n, k, group, bits = 6, 96, 32, 4
    weight, steps = codes_of(bits, n, k), powers(n, 3)
    book = codes_of(8, 4, 16, seed=7).int().sub(128).to(torch.int8)
    tag = codes_of(2, n, 3, seed=8)
    which = tag.long().repeat_interleave(group, 1) if tagged else torch.zeros(n, k, dtype=torch.int64)
    codes, scale, sums = lut_build(numbers(2, k), group)
    unit = torch.ones_like(scale)
    found = lut_gemv(
        codes, unit, sums, weight, steps, None, book if tagged else book[0], None, bits, group,
        tag=tag if tagged else None,
    )  # fmt: skip
    wanted = codes.double() @ weight_of(weight, steps, None, group, book[which, weight.long()]).t()
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_of_bits_are_the_numbers(bits: int) -> None:
    """The identity behind tables, in float64."""
    q, x = codes_of(bits, 7, 64).double(), numbers(64).double()
    quads, total = x.unflatten(0, (-1, 4)), torch.zeros(7, dtype=torch.float64)
    for bit in range(bits):
        signs = 2.0 * ((q.long() >> bit) & 1) - 1.0
        total += 2.0**bit * (signs.unflatten(1, (-1, 4)) * quads).sum((1, 2))
    assert torch.allclose((total + (2**bits - 1) * x.sum()) / 2, q @ x, rtol=0, atol=1e-12)


def test_entries_of_tables() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, 120.0, 0.0, 0.0, 0.0, 0.0, 3.0, 5.0]])
    codes, scale, sums = lut_build(x, 4, "int8")
    assert codes.shape == (1, 3, 16) and scale.tolist() == [[1.0, 0.0, np.float32(8) / np.float32(127)]]
    assert sums.tolist() == [[127.0, 0.0, 8.0]]
    first = [sum(v * (1 if c >> j & 1 else -1) for j, v in enumerate((1, 2, 4, 120))) for c in range(16)]
    assert codes[0, 0].tolist() == first and not codes[0, 1].any()
    assert torch.equal(codes, -codes.flip(-1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("zero", [None, "int", "float"])
def test_tables_of_whole_numbers_are_exact(bits: int, zero: str | None) -> None:
    n, k, group = 5, 72, 32
    x = (codes_of(6, 2, k).float() - 31).clamp(-31, 31)
    x[:, ::group], x[:, 1::group], x[:, 2::group], x[:, 3::group] = 31.0, 31.0, 31.0, 34.0  # 127 together
    weight, steps = codes_of(bits, n, k, seed=1), powers(n, 3)
    zeros = None if zero is None else codes_of(bits, n, 3, seed=1).float() + (0.5 if zero == "float" else 0.0)
    codes, scale, sums = lut_build(x, group, "int8")
    assert (scale == 1).all()
    found = lut_gemv(codes, scale, sums, weight, steps, zeros, None, None, bits, group, "int8")
    assert torch.equal(found.double(), x.double() @ weight_of(weight, steps, zeros, group).t())


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("kind", ["normal", "student", "outlier"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_of_tables_is_that_of_codes(kind: str, bits: int) -> None:
    n, k, group = 64, 1024, 64
    x = numbers(4, k)
    if kind == "student":
        x = x / (numbers(4, k, seed=1) ** 2 + numbers(4, k, seed=2) ** 2).sqrt().clamp(min=0.3)
    if kind == "outlier":
        x[:, 5] = 60.0
    weight, steps = codes_of(bits, n, k), torch.ones(n, k // group)
    zeros = torch.full((n, k // group), (2**bits - 1) / 2)
    wanted = x.double() @ weight_of(weight, steps, zeros, group).t()
    errors = {
        table: error(
            lut_gemv(*lut_build(x, group, table), weight, steps, zeros, None, None, bits, group, table), wanted
        )
        for table in ("exact", "int8")
    }
    assert errors["int8"] <= 2 * errors["exact"] and errors["int8"] < 1e-3


def test_rows_of_zeros_are_zero() -> None:
    x = torch.zeros(2, 40)
    for table in ("exact", "int8"):
        built = lut_build(x, 16, table)
        assert not built[0].any() and not built[1].any()
        found = lut_gemv(*built, codes_of(2, 3, 40), torch.ones(3, 3), None, None, None, 2, 16, table)
        assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bits": 9}, "1 to 8"),
        ({"group": 32}, "build them"),
        ({"codes": torch.zeros(5, 40, dtype=torch.int8)}, "build them"),
        ({"scale": torch.ones(5, 3)}, "build them"),
        ({"scale": torch.ones(3)}, "build them"),
        ({"scale": torch.tensor(1.0)}, "build them"),
        ({"sums": torch.zeros(1, 1, dtype=torch.int32)}, "build them"),
        ({"sums": torch.zeros(3, dtype=torch.int32)}, "build them"),
        ({"bias": torch.ones(1)}, r"give \[3\]"),
        ({"bias": torch.ones(1, 3)}, r"give \[3\]"),
        ({"table": "int7"}, "exact, int8"),
        ({"kernel": "fast"}, "auto, unpack"),
        ({"weight": torch.zeros(3, 40)}, "uint8 codes"),
        ({"codebook": torch.zeros(8, dtype=torch.int8)}, "codebook of 2 bits"),
        ({"weight_zero": torch.zeros(3, 2)}, "3 outputs of 3 groups"),
        ({"tag": torch.zeros(3, 3, dtype=torch.uint8)}, "codebook"),
        ({"kernel": "lut", "bits": 4}, "up to 3 bits.*use kernel='auto'"),
        ({"kernel": "lut", "codebook": torch.zeros(4, dtype=torch.int8)}, "without a codebook"),
        ({"kernel": "unpack", "table": "int8"}, "use 'auto' or 'lut'"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    codes, scale, sums = lut_build(numbers(1, 40), 16)
    given: dict[str, Any] = {
        "codes": codes, "scale": scale, "sums": sums, "weight": codes_of(2, 3, 40), "weight_scale": torch.ones(3, 3),
        "weight_zero": None, "codebook": None, "bias": None, "bits": 2, "group": 16,
    }  # fmt: skip
    with pytest.raises(UsageError, match=said):
        lut_gemv(**{**given, **change})


def test_groups_whose_sums_pass_int32_are_refused() -> None:
    for k, refused in ((66311, False), (66312, True)):
        built = lut_build(torch.ones(1, k), 1 << 20)
        for book in (None, torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)):
            given = (*built, codes_of(8, 1, k), torch.ones(1, 1), None, book, None, 8, 1 << 20)
            with pytest.raises(UsageError, match="at most 66311") if refused else nullcontext():
                lut_gemv(*given)


def test_no_gradient_passes() -> None:
    with pytest.raises(UsageError, match="no gradient"):
        lut_build(numbers(1, 40).requires_grad_(), 16)
    with pytest.raises(UsageError, match="lut_gemv"):
        wq_gemm(*lut_build(numbers(1, 40), 16, "int8"), codes_of(2, 3, 40), torch.ones(3, 3), None, None, None, 2, 16,
                "int8")  # fmt: skip


def test_shapes_without_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        built = lut_build(torch.empty(2, 5, 70), 32)
        assert [tuple(each.shape) for each in built] == [(2, 5, 70), (2, 5, 3), (2, 5, 3)]
        weight = torch.empty(9, 70, dtype=torch.uint8)
        found = lut_gemv(*built, weight, torch.empty(9, 3), None, None, None, 2, 32)
        assert found.shape == (2, 5, 9) and found.dtype == torch.float32
        assert lut_build(torch.empty(2, 70), 32, "int8")[0].shape == (2, 18, 16)
