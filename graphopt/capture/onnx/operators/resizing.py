"""Resampling of images: by PyTorch's operators where they compute the same, otherwise by one matrix for each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Known, Present, Tensor, Value, known
from graphopt.operators.quantization import along

aten = torch.ops.aten

_ROUNDING = 1e-4  # of a size that is a product of floats

_NEAREST = {3: aten.upsample_nearest1d.vec, 4: aten.upsample_nearest2d.vec, 5: aten.upsample_nearest3d.vec}
_LINEAR = {3: aten.upsample_linear1d.vec, 4: aten.upsample_bilinear2d.vec, 5: aten.upsample_trilinear3d.vec}
_CROPS = "tf_crop_and_resize"
_OUTWARD = "outward"  # the rounding of opset 10, which has no name there


@dataclass(frozen=True)
class _Extent:
    """An axis with its old and new size; `scale` is their quotient as far as sizes are whole."""

    axis: int
    size: Any
    target: Any
    scale: float | None  # None: a whole factor of a dynamic size
    region: tuple[float, float] = (0.0, 1.0)

    @property
    def changes(self) -> bool:
        return not statically_known_true(self.size == self.target) or self.region != (0.0, 1.0)

    @property
    def is_whole(self) -> bool:
        """Whether stepping by the scale is stepping by the quotient of the sizes, as PyTorch does."""
        return self.scale is None or abs(self.size * self.scale - self.target) <= _ROUNDING


@dataclass(frozen=True)
class _Method:
    mode: str
    coordinates: str
    rounding: str
    antialias: bool
    excludes: bool
    sharpness: float


@operator("Resize")
def resize(op: Operation, value: Present, region: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    """Opset 10 has the scales as its second input, and steps from corner to corner of each element."""
    value, attributes = op.tensor(value), op.attributes
    mode = attributes.text("mode", "nearest")
    if op.opset < 11:
        return _resized(op, value, _extents(op, value, region, None, None), _old(mode))
    method = _Method(
        mode,
        attributes.text("coordinate_transformation_mode", "half_pixel"),
        attributes.text("nearest_mode", "round_prefer_floor"),
        bool(attributes.integer("antialias")),
        bool(attributes.integer("exclude_outside")),
        attributes.number("cubic_coeff_a", -0.75),
    )
    attributes.ignore("extrapolation_value")
    cut = region if method.coordinates == _CROPS else None
    return _resized(op, value, _extents(op, value, scales, sizes, cut), method)


@operator("Upsample")
def upsample(op: Operation, value: Present, scales: Value = None) -> Tensor:
    """Before opset 9 the scales are an attribute."""
    value, mode = op.tensor(value), op.attributes.text("mode", "nearest")
    if op.opset < 9:
        scales = known([float(item) for item in op.attributes.numbers("scales") or []], torch.float32)
    return _resized(op, value, _extents(op, value, scales, None, None), _old(mode))


def _old(mode: str) -> _Method:
    """What shrinks takes the nearest element behind, what grows the one before."""
    return _Method("linear" if mode == "bilinear" else mode, "asymmetric", _OUTWARD, False, False, -0.75)


def _extents(op: Operation, value: Tensor, scales: Value, sizes: Value, region: Value) -> list[_Extent]:
    given = op.attributes.integers("axes")
    axes = list(range(value.ndim)) if given is None else [op.axis(item, value.ndim) for item in given]
    policy = op.attributes.text("keep_aspect_ratio_policy", "stretch")
    wholes = [value.shape[axis] for axis in axes]
    if sizes is None:
        factors = [float(np.float32(item)) for item in op.sizes(scales, f"the scales of {op.name}")]
        targets = [_scaled(op, size, factor) for size, factor in zip(wholes, factors, strict=True)]
    else:
        factors, targets = [], op.sizes(sizes, "the sizes of Resize")
        if policy != "stretch":
            factors, targets = _kept(op, wholes, targets, policy)
    cut = [0.0] * len(axes) + [1.0] * len(axes) if region is None else op.sizes(region, "the region of Resize")
    extents = []
    for place, (axis, size, target) in enumerate(zip(axes, wholes, targets, strict=True)):
        is_fixed = isinstance(size, int) and isinstance(target, int) and size > 0
        scale = None if not is_fixed else factors[place] if factors else target / size
        extents.append(_Extent(axis, size, target, scale, (cut[place], cut[place + len(axes)])))
    if not any(extent.changes for extent in extents):
        return []
    return [extent for extent in extents if extent.changes or extent.scale not in (None, 1.0)]  # as ONNX Runtime does


def _kept(op: Operation, sizes: Sequence[Any], targets: Sequence[Any], policy: str) -> tuple[list[float], list[int]]:
    """One factor for all axes, and sizes near those asked for by it; halves round up."""
    choose = {"not_larger": min, "not_smaller": max}.get(policy)
    if choose is None or not all(isinstance(item, int) for item in (*sizes, *targets)):
        raise op.refuse(f"Resize with the policy {policy!r} is only imported for sizes that are numbers")
    factor = choose(target / size for size, target in zip(sizes, targets, strict=True))
    return [factor] * len(sizes), [math.floor(factor * size + 0.5) for size in sizes]


def _scaled(op: Operation, size: Any, factor: float) -> Any:
    if factor.is_integer():
        return size * int(factor)
    if not isinstance(size, int):
        raise op.refuse("Resize of a dynamic size by a fraction is not imported; give that axis a number")
    return math.floor(np.float32(size) * np.float32(factor))


def _resized(op: Operation, value: Tensor, extents: Sequence[_Extent], method: _Method) -> Tensor:
    if not extents:
        return value
    if method.mode not in ("nearest", "linear", "cubic"):
        raise op.refuse(f"mode {method.mode!r} of {op.name} is none of nearest, linear and cubic")
    if method.mode != "nearest" and not value.dtype.is_floating_point:
        raise op.refuse(f"{op.name} with mode {method.mode} of integers is not imported; cast them to float around it")
    if (result := _by_torch(op, value, extents, method)) is not None:
        return result
    result, outside = value, []
    for extent in extents:
        if extent.scale is None:
            listed = f"mode {method.mode} and coordinates {method.coordinates}"
            raise op.refuse(f"{op.name} of a dynamic size with {listed} is not imported; give that axis a number")
        places = _places(op, extent, method.coordinates)
        if method.coordinates == _CROPS:
            past = (places < 0) | (places > extent.size - 1)
            outside += [(extent.axis, past)] if past.any() else []
        if method.mode == "nearest":
            result = op.call(aten.index_select.default, result, extent.axis, _rows(op, extent, places, method))
        else:
            result = _mixed(op, result, extent.axis, _weights(extent, places, method))
    for axis, past in outside:
        mask = op.reshape(known(past.tolist(), torch.bool), along(axis, value.ndim))
        filler = op.attributes.number("extrapolation_value", 0.0)
        result = op.call(aten.masked_fill.Scalar, result, mask, filler)
    return result


def _by_torch(op: Operation, value: Tensor, extents: Sequence[_Extent], method: _Method) -> Tensor | None:
    """None where PyTorch has no such operator, or another meaning of it."""
    if method.antialias or value.ndim not in _NEAREST or any(extent.axis < 2 for extent in extents):
        return None
    if not all(extent.is_whole for extent in extents):
        return None
    sizes = list(value.shape[2:])
    for extent in extents:
        sizes[extent.axis - 2] = extent.target
    if method.mode == "nearest":
        grows = all(extent.scale is None or extent.scale >= 1 for extent in extents)
        floors = method.rounding == "floor" or (method.rounding == _OUTWARD and grows)
        same = method.coordinates == "asymmetric" and floors
        return op.call(_NEAREST[value.ndim], value, sizes, None) if same else None
    corners = method.coordinates == "align_corners"
    halves = method.coordinates in ("half_pixel", "pytorch_half_pixel")
    if not corners and not (halves and not any(size == 1 for size in sizes)):
        return None
    if method.mode == "linear":
        return op.call(_LINEAR[value.ndim], value, sizes, corners, None)
    same = value.ndim == 4 and method.sharpness == -0.75 and not method.excludes
    return op.call(aten.upsample_bicubic2d.vec, value, sizes, corners, None) if same else None


def _places(op: Operation, extent: _Extent, coordinates: str) -> Any:
    """Where each new element lies among the old ones."""
    assert extent.scale is not None
    scale, last = extent.scale, extent.size - 1
    width = scale * extent.size  # the new size before it is rounded
    numbers = np.arange(extent.target, dtype=np.float64)
    match coordinates:
        case "half_pixel":
            return (numbers + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (numbers + 0.5) / scale - 0.5 if extent.target > 1 else numbers
        case "half_pixel_symmetric":
            return extent.size / 2 * (1 - extent.target / width) + (numbers + 0.5) / scale - 0.5
        case "asymmetric":
            return numbers / scale
        case "align_corners":
            return numbers * last / (width - 1) if width != 1 else numbers * 0
        case "tf_half_pixel_for_nn":
            return (numbers + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = extent.region
            if width == 1:
                return numbers * 0 + (start + end) / 2 * last
            return start * last + numbers * (end - start) * last / (width - 1)
    raise op.refuse(f"coordinate_transformation_mode {coordinates!r} does not exist")


def _rows(op: Operation, extent: _Extent, places: Any, method: _Method) -> Known:
    """The nearest old element of each new one."""
    assert extent.scale is not None
    rounding = method.rounding
    if rounding == _OUTWARD:
        rounding = "floor" if extent.scale >= 1 else "ceil"
    rows = np.clip(_rounded(op, places, rounding), 0, extent.size - 1)
    return known(rows.astype(np.int64).tolist())


def _rounded(op: Operation, places: Any, rounding: str) -> Any:
    match rounding:
        case "round_prefer_floor":
            return np.ceil(places - 0.5)
        case "round_prefer_ceil":
            return np.floor(places + 0.5)
        case "floor":
            return np.floor(places)
        case "ceil":
            return np.ceil(places)
    raise op.refuse(f"nearest_mode {rounding!r} does not exist")


def _weights(extent: _Extent, places: Any, method: _Method) -> Any:
    """[new, old]: the share that each old element has in each new one; edges are repeated without end."""
    assert extent.scale is not None
    shrink = min(extent.scale, 1.0) if method.antialias else 1.0
    reach = math.ceil((1 if method.mode == "linear" else 2) / shrink) + 1
    taps = np.floor(places)[:, None].astype(np.int64) + np.arange(-reach, reach + 2)
    shares = _kernel(np.abs(taps - places[:, None]) * shrink, method)
    if method.excludes:
        shares = np.where((taps < 0) | (taps >= extent.size), 0.0, shares)
    total = shares.sum(1, keepdims=True)
    shares = shares / np.where(total == 0, 1.0, total)
    matrix = np.zeros((len(places), extent.size))
    rows = np.broadcast_to(np.arange(len(places))[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, extent.size - 1)), shares)
    return matrix


def _kernel(distance: Any, method: _Method) -> Any:
    if method.mode == "linear":
        return np.maximum(1 - distance, 0)
    a, d = method.sharpness, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _mixed(op: Operation, value: Tensor, axis: int, matrix: Any) -> Tensor:
    """Every new element along the axis as a sum of old ones."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    shares = torch.from_numpy(np.ascontiguousarray(matrix.T)).to(wide)
    weight = op.emitter.attribute(op.emitter.weights.add("resampling", shares, trainable=False))
    turned = op.call(aten.transpose.int, op.cast(value, wide), axis, value.ndim - 1)
    mixed = op.call(aten.transpose.int, op.call(aten.matmul.default, turned, weight), axis, value.ndim - 1)
    return op.cast(mixed, value.dtype)
