"""graphopt::qlinear and qconv: the sums of brute force in Python's integers, and the rounding of codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators import integer_products  # noqa: F401

qlinear, qconv = torch.ops.graphopt.qlinear, torch.ops.graphopt.qconv
BYTE = {"dtype": torch.uint8}
NUMBER = {"dtype": torch.float32}
ONE = torch.tensor(1.0)


def codes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def zero(value: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def linear(x: Tensor, z: Tensor | None, w: Tensor, bias: Any = None, scale: Any = None, **options: Any) -> Tensor:
    given = (ONE, z, w, ONE, bias, scale, None, None, None, None)
    result: Tensor = qlinear(x, *given, **(BYTE if scale is not None else NUMBER), **options)
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_sums_are_those_of_integers(dtype: torch.dtype) -> None:
    x, w = codes(3, 17, dtype=dtype), codes(5, 17, dtype=torch.int8, seed=1)
    bias = torch.arange(5, dtype=torch.int32) * 1001
    found = linear(x, zero(99, dtype), w, bias)
    rows = [[sum((int(a) - 99) * int(b) for a, b in zip(row, out, strict=True)) for out in w] for row in x]
    assert torch.equal(found, (torch.tensor(rows) + bias).float())


def test_weights_that_no_int8_holds() -> None:
    x, w = codes(3, 17), codes(5, 17, seed=1).to(torch.int16) - torch.tensor([[0], [255], [100], [128], [3]]).short()
    rows = [[sum((int(a) - 99) * int(b) for a, b in zip(row, out, strict=True)) for out in w] for row in x]
    assert torch.equal(linear(x, zero(99), w), torch.tensor(rows).float())
    for codes_of_no_byte in ([[256, 1]], [[-256, -1]], [[-128, 128]]):
        with pytest.raises(UsageError, match="at most 255 apart in one output"):
            linear(x[:, :2], None, torch.tensor(codes_of_no_byte).short())


@pytest.mark.parametrize("sign", [127, -127, -128])
def test_the_deepest_sum_that_int32_holds(sign: int) -> None:
    depth = 65536
    x, w = torch.full((1, depth), 255, dtype=torch.uint8), torch.full((1, depth), sign).to(torch.int8)
    assert linear(x, None, w).item() == np.float32(255 * sign * depth)


def test_images_are_padded_with_what_stands_for_zero() -> None:
    x, w = codes(1, 4, 5, 5), codes(4, 2, 3, 3, dtype=torch.int8, seed=1)
    options = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
    found = qconv(x, ONE, zero(130), w, ONE, None, None, None, None, None, None, **options, **NUMBER)
    whole = torch.zeros(4, 3, 5, dtype=torch.int64)
    for o in range(4):
        for h in range(3):
            for v in range(5):
                for c in range(2):
                    for kh in range(3):
                        for kw in range(3):
                            row, column = 2 * h + kh - 1, v + 2 * kw - 2
                            if 0 <= row < 5 and 0 <= column < 5:
                                code = int(x[0, 2 * (o // 2) + c, row, column]) - 130
                                whole[o, h, v] += code * int(w[o, c, kh, kw])
    assert torch.equal(found[0], whole.float())


def test_sides_may_be_padded_unequally() -> None:
    x, w = codes(2, 3, 5, 6), codes(4, 3, 3, 2, dtype=torch.int8, seed=1)
    given = (ONE, zero(131), w, ONE, None, None, None, None, None, None)
    options = {"stride": [2, 1], "dilation": [1, 2]}
    found = qconv(x, *given, padding=[0, 1, 2, 0], **options, **NUMBER)
    wide = torch.nn.functional.pad(x, (1, 0, 0, 2), value=131)
    assert torch.equal(found, qconv(wide, *given, padding=[0, 0], **options, **NUMBER))


def test_halves_round_to_even_and_zero_points_are_added_after() -> None:
    x, w = torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(1, 1, dtype=torch.int8)
    given = (ONE, None, w, ONE, None, torch.tensor(2.0), zero(7), None, None, None)
    assert qlinear(x, *given, **BYTE)[:, 0].tolist() == [7, 7, 8, 9, 9, 9, 10, 11]
    assert qlinear(x, *given, **BYTE, qmin=8, qmax=10)[:, 0].tolist() == [8, 8, 8, 9, 9, 9, 10, 10]


def test_bias_residual_and_activation_are_numbers() -> None:
    x, w, r = codes(6, 8), codes(4, 8, dtype=torch.int8, seed=1), codes(6, 4, seed=2)
    xs, ws, rs = torch.tensor(0.02), torch.rand(4) * 0.01 + 0.001, torch.tensor(0.05)
    bias, scale = torch.randn(4), torch.tensor(0.03)
    found = qlinear(x, xs, zero(120), w, ws, bias, scale, zero(128), r, rs, zero(100), activation="gelu", **BYTE)
    number = (x.double() - 120) @ w.double().t() * xs.double() * ws.double() + bias.double()
    number = torch.nn.functional.gelu(number + (r.double() - 100) * rs.double())
    exact = number / scale.double()
    wanted = (exact.round() + 128).clamp(0, 255)
    close = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(found[~close].double(), wanted[~close])
    assert (found.double() - wanted).abs().max() <= 1


def test_what_does_not_fit_is_refused() -> None:
    x, w = codes(2, 8), codes(4, 8, dtype=torch.int8)
    with pytest.raises(UsageError, match="weights of integer products are int8"):
        linear(x, None, w.to(torch.uint8))
    with pytest.raises(UsageError, match=r"take codes of 8 bits, not torch\.int32"):
        linear(x.int(), None, w)
    with pytest.raises(UsageError, match="no activation 'swish'; use one of gelu"):
        linear(x, None, w, activation="swish")
    with pytest.raises(UsageError, match="codes from 0 to 300"):
        linear(x, None, w, scale=ONE, qmax=300)
    with pytest.raises(UsageError, match="scales of shape"):
        qlinear(x, ONE, None, w, torch.ones(3), None, None, None, None, None, None, **NUMBER)
    with pytest.raises(UsageError, match="no gradient passes through products of integers"):
        qlinear(x, ONE.clone().requires_grad_(), None, w, ONE, None, None, None, None, None, None, **NUMBER)


def test_shapes_without_running() -> None:
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(2, 3, 8, dtype=torch.uint8), torch.empty(4, 8, dtype=torch.int8)
        step = torch.empty(())
        rest = (step, None, None, None, None, None)
        assert qlinear(x, step, None, w, *rest, None, **NUMBER).shape == (2, 3, 4)
        assert qlinear(x, step, None, w, step, None, step, *rest[1:5], **BYTE).dtype == torch.uint8
        with pytest.raises(UsageError, match="rows of 8 codes do not fit"):
            qlinear(x, step, None, torch.empty(4, 7, dtype=torch.int8), *rest, None, **NUMBER)
