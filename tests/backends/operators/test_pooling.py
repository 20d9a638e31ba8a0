"""Pooling with every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Check = Callable[..., None]


def test_one_axis(agree: Check) -> None:
    agree(
        {
            "max": lambda x: F.max_pool1d(x, 3, 2),
            "average": lambda x: F.avg_pool1d(x, 3, 2, 1),
            "adaptive": lambda x: F.adaptive_avg_pool1d(x, 5),
        },
        [torch.randn(2, 4, 16)],
    )


POOLS: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max_overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_dilated": lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1)),
    "max_ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_ceil_padded": lambda x: F.max_pool2d(x, 3, 3, 1, ceil_mode=True),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average_padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average_inside": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average_ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "average_ceil_inside": lambda x: F.avg_pool2d(x, 2, 2, 0, ceil_mode=True, count_include_pad=False),
    "average_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive_unequal": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive_same": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
    "mean": lambda x: x.mean((2, 3)),
}


def test_pooling(agree: Check) -> None:
    agree(POOLS, [torch.randn(2, 3, 9, 8)], [{0: "batch"}], [(torch.randn(1, 3, 9, 8),)])


def test_windows_of_many_taps(agree: Check) -> None:
    """Of sixty taps in a row: what is written for one must not double with each."""
    agree({"max": lambda x: F.max_pool2d(x, (2, 60), 1)}, [torch.randn(1, 5, 3, 64)])


def test_pooling_of_symbolic_images(agree: Check) -> None:
    names = (
        "max",
        "max_overlapping",
        "max_ceil",
        "average_padded",
        "average_inside",
        "average_ceil",
        "adaptive_one",
        "mean",
    )
    more = [(torch.randn(1, 2, h, w),) for h, w in [(9, 13), (12, 20)]]
    cases = {name: POOLS[name] for name in names}
    agree(cases, [torch.randn(1, 2, 10, 14)], [{2: "height", 3: "width"}], more)
