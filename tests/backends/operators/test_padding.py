"""Borders by every mode, also of sizes known when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Check = Callable[..., Any]


def test_borders(agree: Check) -> None:
    cases: dict[str, Callable[..., Any]] = {
        "reflect": lambda x: F.pad(x, (2, 1, 1, 3), mode="reflect"),
        "replicate": lambda x: F.pad(x, (2, 1, 1, 3), mode="replicate"),
        "circular": lambda x: F.pad(x, (2, 1, 1, 3), mode="circular"),
    }
    cases["rows"] = lambda x: F.pad(x[0], (3, 0), mode="reflect")
    agree(cases, [torch.randn(2, 3, 5, 6)])
    agree(cases, [torch.randn(2, 3, 5, 6)], [{0: "batch", 3: "width"}], [(torch.randn(1, 3, 5, 9),)])
