"""Distances between rows as models write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Check = Callable[..., Any]


def test_distances(agree: Check) -> None:
    cases = {"cdist": torch.cdist, "cdist_1": lambda a, b: torch.cdist(a, b, p=1.0), "pdist": lambda a, b: F.pdist(a)}
    agree(cases, [torch.randn(9, 4), torch.randn(5, 4)])
