"""graphopt::gated_convolution and graphopt::gated_linear: the rules that the specification states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import graphopt.operators  # noqa: F401
from graphopt.errors import UsageError

convolution, linear = torch.ops.graphopt.gated_convolution, torch.ops.graphopt.gated_linear
PLAIN: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
INPUTS = torch.tensor([[True, False], [True, True], [False, False]])
OUTPUTS = torch.tensor([[False, True, True], [True, True, True], [True, False, False]])


def spread(active: torch.Tensor, axes: int) -> torch.Tensor:
    return active.repeat_interleave(16, 1).reshape(*active.shape[:1], -1, *[1] * axes)


def test_a_convolution_leaves_out_blocks() -> None:
    x, weight, bias = torch.randn(3, 32, 5, 4), torch.randn(48, 32, 3, 3), torch.randn(48)
    found = convolution(x, weight, bias, INPUTS, OUTPUTS, **PLAIN)
    wanted = functional.conv2d(x * spread(INPUTS, 2), weight, bias, padding=1) * spread(OUTPUTS, 2)
    torch.testing.assert_close(found, wanted)
    everything = [torch.ones_like(mask) for mask in (INPUTS, OUTPUTS)]
    plain = functional.conv2d(x, weight, bias, padding=1)
    assert torch.equal(convolution(x, weight, bias, *everything, **PLAIN), plain)
    assert torch.equal(convolution(x, weight, bias, None, None, **PLAIN), plain)


def test_what_is_left_out_counts_as_zero_even_where_it_is_not_finite() -> None:
    x, weight = torch.full((3, 32, 2, 2), torch.nan), torch.randn(48, 32, 1, 1)
    x[:, :16] = torch.randn(3, 16, 2, 2)
    found = convolution(x, weight, None, INPUTS, None, stride=[1, 1], padding=[0, 0], dilation=[1, 1])
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].any()


def test_depthwise_leaves_out_outputs_only() -> None:
    x, weight = torch.randn(3, 48, 5, 5), torch.randn(48, 1, 3, 3)
    found = convolution(x, weight, None, None, OUTPUTS, **PLAIN, groups=48)
    torch.testing.assert_close(found, functional.conv2d(x, weight, padding=1, groups=48) * spread(OUTPUTS, 2))
    with pytest.raises(UsageError, match="depthwise"):
        convolution(x, weight, None, OUTPUTS, None, **PLAIN, groups=48)


@pytest.mark.parametrize("lead", [(3,), (3, 5), (3, 2, 2)])
def test_all_rows_of_a_sample_share_the_masks_of_a_linear(lead: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*lead, 32), torch.randn(48, 32), torch.randn(48)
    rows = [3, *[1] * (len(lead) - 1), -1]
    found = linear(x, weight, bias, INPUTS, OUTPUTS)
    inputs, outputs = (spread(mask, 0).reshape(rows) for mask in (INPUTS, OUTPUTS))
    torch.testing.assert_close(found, functional.linear(x * inputs, weight, bias) * outputs)


def test_gradients_are_those_of_what_takes_part() -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(3, 32, **options), torch.randn(48, 32, **options), torch.randn(48, **options)
    for inputs, outputs in ((INPUTS, OUTPUTS), (INPUTS, None), (None, OUTPUTS)):
        ours = torch.autograd.grad(linear(x, weight, bias, inputs, outputs).sin().sum(), (x, weight, bias))
        left = 1 if inputs is None else spread(inputs, 0)
        right = 1 if outputs is None else spread(outputs, 0)
        plain = (functional.linear(x * left, weight, bias) * right).sin().sum()
        for one, other in zip(ours, torch.autograd.grad(plain, (x, weight, bias)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("inputs", "outputs", "options", "reason"),
    [
        (INPUTS.float(), None, {}, "give bool"),
        (INPUTS[:2], None, {}, r"active_inputs is \[2, 2\]"),
        (None, INPUTS, {}, r"active_outputs is \[3, 2\] where 48 channels"),
        (None, OUTPUTS, {"block": 8}, "multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: Any, outputs: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        linear(torch.randn(3, 32), torch.randn(48, 32), None, inputs, outputs, **options)


def test_torch_accepts_the_definitions() -> None:
    """Schema, fake values and gradients, as torch.library checks them."""
    x, weight = torch.randn(3, 32, 4, 4, requires_grad=True), torch.randn(48, 32, 3, 3, requires_grad=True)
    torch.library.opcheck(convolution.default, (x, weight, torch.randn(48), INPUTS, OUTPUTS), PLAIN)
    rows, matrix = torch.randn(3, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    torch.library.opcheck(linear.default, (rows, matrix, None, INPUTS, None))
