"""Codes of weights: what they stand for, against definitions written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.passes.quantize.weights import BITS, WeightForm, table


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, value: Tensor) -> float:
    return float((found - value).square().mean() / value.square().mean())


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3)])
def test_int8_rounds_each_channel_by_its_largest(shape: tuple[int, ...]) -> None:
    value = weight(*shape) * torch.logspace(-20, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    encoded = WeightForm("int8", "per-channel").encode(value, 0, 1)
    for row, codes, scale in zip(value, encoded.codes, encoded.scale, strict=True):
        assert codes.dtype is torch.int8 and int(codes.abs().max()) == 127
        assert float(scale) == pytest.approx(float(row.abs().max()) / 127, rel=1e-6)
    assert torch.all((encoded.numbers() - value).abs() <= encoded.scale.reshape(-1, *[1] * (len(shape) - 1)) * 0.5001)


def test_scales_run_along_the_outputs_wherever_they_are() -> None:
    value = weight(5, 7)
    straight = WeightForm("int8", "per-channel").encode(value, 0, 1)
    turned = WeightForm("int8", "per-channel").encode(value.t().contiguous(), 1, 0)
    assert turned.axis == 1 and torch.equal(turned.numbers().t(), straight.numbers())
    for kind in ("int4", "nf4"):
        groups: Any = [WeightForm(kind, "per-group", 3).encode(*args) for args in ((value, 0, 1), (value.t(), 1, 0))]
        assert torch.equal(groups[1].numbers().t(), groups[0].numbers())


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel", "per-group"])
def test_zeros_and_tiny_numbers_have_codes(kind: Any, granularity: Any) -> None:
    value = torch.zeros(4, 10)
    value[1] = 1e-44
    value[2, 3] = 5.0
    encoded = WeightForm(kind, granularity, 4).encode(value, 0, 1)
    found = encoded.numbers()
    assert found.isfinite().all() and encoded.scale.isfinite().all() and bool((encoded.scale > 0).all())
    assert torch.equal(found[0], torch.zeros(10)) and found[2, 3] == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("size", [1, 5, 16, 33])
def test_each_group_is_coded_on_its_own(size: int) -> None:
    """The last group is what is left; a change in one group changes no other."""
    value = weight(3, 40)
    form = WeightForm("int4", "per-group", size)
    before = form.encode(value, 0, 1)
    changed = value.clone()
    changed[1, :size] *= 100
    after = form.encode(changed, 0, 1)
    same = torch.ones(3, 40, dtype=torch.bool)
    same[1, :size] = False
    assert torch.equal(before.numbers()[same], after.numbers()[same])
    assert before.scale.shape == (3, -(-40 // size)) and before.block == size
    assert int(before.codes.min()) >= -8 and int(before.codes.max()) <= 7


def test_int4_is_never_worse_than_rounding_by_the_largest() -> None:
    value = weight(64, 128) ** 3
    found = WeightForm("int4", "per-group", 32).encode(value, 0, 1).numbers()
    groups = value.reshape(64, 4, 32)
    scale = groups.abs().amax(2, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale).reshape(64, 128)
    ours, theirs = ((item - value).reshape(64, 4, 32).square().sum(2) for item in (found, plain))
    assert bool((ours <= theirs * (1 + 1e-6)).all()) and float(ours.sum()) < 0.9 * float(theirs.sum())


def test_nf4_has_the_numbers_of_the_paper_and_takes_the_nearest() -> None:
    """Dettmers et al. 2023, appendix E, to the digits printed there."""
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    printed += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    printed += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    printed += [0.7229568362236023, 1.0]
    torch.testing.assert_close(table("nf4"), torch.tensor(printed), rtol=0, atol=2e-7)
    value = weight(4, 64)
    encoded = WeightForm("nf4", "per-group", 64).encode(value, 0, 1)
    distance = (value[:, :, None] / encoded.scale[:, :, None] - table("nf4")).abs()
    assert torch.equal(encoded.codes.long(), distance.argmin(2))


def test_fp8_is_the_nearest_of_its_numbers() -> None:
    value = weight(4, 64)
    encoded = WeightForm("fp8", "per-channel").encode(value, 0, 1)
    assert torch.equal(table("fp8")[encoded.codes.long()] * encoded.scale[:, None], encoded.numbers())
    distance = (value[:, :, None] / encoded.scale[:, None, None] - table("fp8")).abs().amin(2)
    own = (value / encoded.scale[:, None] - table("fp8")[encoded.codes.long()]).abs()
    assert torch.equal(own, distance) and table("fp8").isfinite().all()


def test_errors_are_those_known_for_gaussian_weights() -> None:
    """int4 by the largest 0.0139, nf4 0.0092 in groups of 128 (research note 3.4): better scales lie between."""
    value = weight(256, 1024)
    errors = {kind: error(WeightForm(kind, "per-group", 128).encode(value, 0, 1).numbers(), value) for kind in BITS}  # type: ignore[arg-type]
    assert errors["int8"] < errors["fp8"] < errors["nf4"] < errors["int4"] < 0.0139
    assert errors["nf4"] == pytest.approx(0.0092, rel=0.03)


def test_bytes_are_those_of_packed_codes_and_scales() -> None:
    value = weight(16, 64)
    assert WeightForm("int8", "per-channel").encode(value, 0, 1).bytes == 16 * 64 + 4 * 16
    assert WeightForm("nf4", "per-group", 32).encode(value, 0, 1).bytes == 16 * 64 // 2 + 4 * 32
