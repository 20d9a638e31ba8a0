"""Images at another size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Check = Callable[..., Any]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x: F.interpolate(x, size=(7, 11)),
    "nearest_smaller": lambda x: F.interpolate(x, size=(2, 3)),
    "nearest_factor": lambda x: F.interpolate(x, scale_factor=(1.5, 2.5)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear_corners": lambda x: F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True),
    "bilinear_smaller": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear"),
    "bilinear_factor": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "bicubic_corners": lambda x: F.interpolate(x, size=(9, 7), mode="bicubic", align_corners=True),
    "bicubic_smaller": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic"),
    "linear": lambda x: F.interpolate(x[:, :, 0], size=9, mode="linear"),
}


def test_sizes_and_modes(agree: Check) -> None:
    agree(CASES, [torch.randn(2, 3, 5, 6)], atol=1e-5)


def test_positions_in_float64(agree: Check) -> None:
    agree({name: CASES[name] for name in ("bilinear_smaller", "linear")}, [torch.randn(2, 3, 7, 5).double()])


def test_symbolic_image(agree: Check) -> None:
    names = ("nearest", "bilinear", "bilinear_corners", "nearest_size")
    more = [(torch.randn(1, 2, h, w),) for h, w in [(4, 9), (8, 4)]]
    cases = {name: CASES[name] for name in names}
    agree(cases, [torch.randn(1, 2, 5, 6)], [{2: "height", 3: "width"}], more, atol=1e-5)


def test_channels_last(agree: Check) -> None:
    """Through a channels-last input: whole vectors of channels, tails, and an epilogue."""
    names = ("nearest_size", "bilinear", "bilinear_corners", "bilinear_smaller", "bicubic_smaller")
    for channels in (1, 3, 16, 37):
        cases = {name: lambda x, case=CASES[name]: torch.relu(case(x.permute(0, 3, 1, 2))) for name in names}
        inputs = [torch.randn(2, 5, 6, channels)]
        run = agree(cases, inputs, [{0: "b", 1: "h"}], [(torch.randn(1, 7, 6, channels),)], atol=1e-5)
        rules = {kernel.rule for kernel in run.artifact.manifest.variants[0].kernels.values()}
        assert "resampling" in rules or channels == 1
