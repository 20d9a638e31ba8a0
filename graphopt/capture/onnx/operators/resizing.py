"""Resampling of images; only the forms that PyTorch computes the same way."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_ROUNDING = 1e-4  # of a size that is a product of floats

_NEAREST = {3: aten.upsample_nearest1d.vec, 4: aten.upsample_nearest2d.vec, 5: aten.upsample_nearest3d.vec}
_LINEAR = {3: aten.upsample_linear1d.vec, 4: aten.upsample_bilinear2d.vec, 5: aten.upsample_trilinear3d.vec}


@operator("Resize")
def resize(op: Operation, value: Present, region: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    value = op.tensor(value)
    attributes = op.attributes
    attributes.ignore("extrapolation_value")
    sharpness, outside = attributes.number("cubic_coeff_a", -0.75), attributes.integer("exclude_outside", 0)
    mode = attributes.text("mode", "nearest")
    where = attributes.text("coordinate_transformation_mode", "half_pixel")
    rounding = attributes.text("nearest_mode", "round_prefer_floor")
    target = _sizes(op, value, scales, sizes)
    if attributes.integer("antialias") or attributes.has("axes") or value.ndim not in _NEAREST:
        raise op.refuse("Resize with antialias or axes is not imported")
    if mode == "nearest" and where == "asymmetric" and rounding == "floor":
        return op.call(_NEAREST[value.ndim], value, target, None)
    corners = where == "align_corners"
    plain = where in ("half_pixel", "pytorch_half_pixel") and not any(size == 1 for size in target)
    if mode == "linear" and (corners or plain):
        return op.call(_LINEAR[value.ndim], value, target, corners, None)
    if mode == "cubic" and (corners or plain) and value.ndim == 4 and sharpness == -0.75 and not outside:
        return op.call(aten.upsample_bicubic2d.vec, value, target, corners, None)
    raise op.refuse(f"Resize with mode {mode}, coordinates {where} and rounding {rounding} is not imported")


def _sizes(op: Operation, value: Tensor, scales: Value, sizes: Value) -> list[Any]:
    """The new spatial sizes; batch and channels must stay."""
    policy = op.attributes.text("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        raise op.refuse("Resize that keeps the aspect ratio is not imported")
    if sizes is not None:
        return op.sizes(sizes, "the sizes of Resize")[2:]
    factors = op.sizes(scales, "the scales of Resize")
    if [float(item) for item in factors[:2]] != [1.0, 1.0]:
        raise op.refuse("Resize over batch or channels is not imported")
    pairs = zip(value.shape[2:], factors[2:], strict=True)
    return [_scaled(op, size, float(factor)) for size, factor in pairs]


def _scaled(op: Operation, size: Any, factor: float) -> Any:
    if factor.is_integer():
        return size * int(factor)
    if not isinstance(size, int):
        raise op.refuse("Resize of a dynamic size by a fraction is not imported")
    exact = size * factor
    if abs(exact - round(exact)) > _ROUNDING:  # ONNX steps by the scale, PyTorch by the quotient of the sizes
        raise op.refuse(f"Resize of {size} by {factor:g}, which is no whole size, is not imported; give it sizes")
    return round(exact)
