"""How a stable sort is written in ONNX: TopK of the whole axis, of equal elements the first one first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op


def _sort(values: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    if not values.shape:
        values = op.Reshape(values, [1])
        found, places = op.TopK(values, [1])
        return op.Reshape(found, []), op.Reshape(places, [])
    axis = dim % len(values.shape)
    size = op.Shape(values, start=axis, end=axis + 1)
    return op.TopK(values, size, axis=axis, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {torch.ops.aten.sort.stable: _sort}
"""By operator, for the exporter; all of it is there at opset 18 and later."""
