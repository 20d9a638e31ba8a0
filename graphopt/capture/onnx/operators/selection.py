"""What has as many results as its inputs' values say: computed now, from constants or from inputs that are bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import KNOWN_ELEMENTS, Present, Tensor, Value, known, known_tensor

aten = torch.ops.aten


@operator("Compress")
def compress(op: Operation, value: Present, condition: Present) -> Tensor:
    """The slices, or without an axis the elements, whose condition is true; the condition may be shorter."""
    axis = op.attributes.integer("axis") if op.attributes.has("axis") else None
    value = op.tensor(value) if axis is not None else op.reshape(value, [-1])
    places = [place for place, item in enumerate(op.integers(condition, "the condition of Compress")) if item]
    return op.call(aten.index_select.default, value, 0 if axis is None else op.axis(axis, value.ndim), known(places))


@operator("NonZero")
def nonzero(op: Operation, value: Present) -> Present:
    """[axes, elements that are not 0]."""
    return _held(op, _values(op, value).nonzero().t().contiguous())


@operator("Unique")
def unique(op: Operation, value: Present) -> tuple[Present, ...]:
    """Different elements, or slices along an axis; where each is first, which one each is, how often each occurs."""
    given = _values(op, value)
    array = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    axis = op.axis(op.attributes.integer("axis"), array.ndim) if op.attributes.has("axis") else None
    found, first, inverse, counts = np.unique(
        array, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    order = np.arange(len(first)) if op.attributes.integer("sorted", 1) else np.argsort(first)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    results = np.take(found, order, axis or 0), first[order], places[inverse.reshape(-1)], counts[order]
    different, *numbers = (torch.from_numpy(np.array(result)) for result in results)
    return tuple(_held(op, result) for result in (different.to(given.dtype), *numbers))


@operator("NonMaxSuppression")
def suppress(
    op: Operation, boxes: Present, scores: Present, most: Value = None, overlap: Value = None, least: Value = None
) -> Present:
    """boxes [N, B, 4], scores [N, classes, B] -> [selected, 3] of image, class and box, the best of a class first."""
    centered = bool(op.attributes.integer("center_point_box"))
    count = 0 if most is None else int(op.sizes(most, "the most boxes of NonMaxSuppression")[0])
    largest = 0.0 if overlap is None else float(op.sizes(overlap, "the overlap of NonMaxSuppression")[0])
    bound = -np.inf if least is None else float(op.sizes(least, "the least score of NonMaxSuppression")[0])
    corners, chances = _corners(_values(op, boxes).numpy(), centered), _values(op, scores).numpy()
    chosen = [
        (image, kind, box)
        for image, kind in np.ndindex(*chances.shape[:2])
        for box in _best(corners[image], chances[image, kind], count, largest, bound)
    ]
    return _held(op, torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3))


def _corners(boxes: Any, centered: bool) -> Any:
    """[..., 4] of the lower and the upper corner."""
    if centered:
        middle, size = boxes[..., :2], boxes[..., 2:]
        return np.concatenate([middle - size / 2, middle + size / 2], -1)
    sides = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return np.concatenate([sides.min(-2), sides.max(-2)], -1)


def _best(boxes: Any, scores: Any, count: int, largest: float, least: float) -> list[int]:
    kept: list[int] = []
    for box in np.argsort(-scores, kind="stable").tolist():
        if len(kept) == count:
            break
        if scores[box] > least and all(_overlap(boxes[box], boxes[other]) <= largest for other in kept):
            kept.append(box)
    return kept


def _overlap(left: Any, right: Any) -> float:
    """The common area as a share of that of both."""
    common = np.prod(np.maximum(np.minimum(left[2:], right[2:]) - np.maximum(left[:2], right[:2]), 0))
    both = np.prod(left[2:] - left[:2]) + np.prod(right[2:] - right[:2]) - common
    return float(common / both) if both > 0 else 0.0


def _values(op: Operation, value: Present) -> torch.Tensor:
    """The elements of what constants decide, or whole numbers of inputs that are bound."""
    what = f"the number of results of {op.name}"
    refusal = f"{what} depends on values at run time; leave it out of the model, and take its inputs as outputs"
    if isinstance(value, Tensor):
        value = op.emitter.binding.numbers(op.emitter, value, what, refusal)
    if value.symbolic:
        raise op.refuse(f"{what} depends on a dynamic size; give that axis a number")
    return value.tensor()


def _held(op: Operation, value: torch.Tensor) -> Present:
    if value.numel() <= KNOWN_ELEMENTS:
        return known_tensor(value)
    return op.emitter.attribute(op.emitter.weights.constant(value))
