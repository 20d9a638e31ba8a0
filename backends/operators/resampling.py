"""Images at another size: the nearest element, or linear or cubic interpolation along every spatial axis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, is_float
from graphopt.backends.rules.resampling import Read, Sample, resample
from graphopt.backends.sizes import Shape, shape_of
from graphopt.backends.values import Index, Lazy, View, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _scale(kernel: Kernel, size: Any, result: Any, factor: float | None, corners: bool, dtype: str = "float32") -> Any:
    """Input elements a step of the output, in the dtype that PyTorch computes positions in."""
    if factor is not None and not corners:
        return tirx.const(1 / factor, dtype)
    size, result = (kernel.size(s) - (1 if corners else 0) for s in (size, result))
    ratio = size.astype(dtype) / tirx.max(result, tirx.const(1, "int64")).astype(dtype)
    return tirx.Select(result > 0, ratio, tirx.const(0, dtype))


def _nearest(lowering: Lowering, node: Node) -> View | Lazy:
    x, _, factors = arguments(node).values()
    view, shape = lowering.view(x), shape_of(node.meta["val"])
    each = list(factors) if factors else [None] * (len(shape) - 2)

    def sample(kernel: Kernel, at: Sequence[Any], read: Read) -> Any:
        axes = []
        for n, place in enumerate(at):
            size = view.shape[2 + n]
            step = _scale(kernel, size, shape[2 + n], each[n], corners=False)
            axes.append(tirx.min((place.astype("float32") * step).astype("int64"), kernel.size(size) - 1))
        return read(axes)

    return _resampled(lowering, node, view, shape, sample)


Taps = Callable[[Any, Any, Any], list[tuple[Any, Any]]]  # (position, size, dtype) -> elements and their weights


def _interpolated(lowering: Lowering, node: Node, taps: Taps, clamp: bool) -> View | Lazy:
    """Half-pixel centres, or corner to corner with `align_corners`; `clamp`: no position lies before the first one."""
    x, _, corners, factors = arguments(node).values()
    view, shape = lowering.view(x), shape_of(node.meta["val"])
    each = list(factors) if factors else [None] * (len(shape) - 2)
    if not is_float(view.dtype):
        raise CompileError(f"{node.name} interpolates {view.dtype}; convert it to float32 first")
    compute = computed_in(view.dtype)
    zero, half = (tirx.const(number, compute) for number in (0.0, 0.5))

    def along(kernel: Kernel, at: Any, n: int) -> list[tuple[Any, Any]]:
        size = view.shape[2 + n]
        step = _scale(kernel, size, shape[2 + n], each[n], corners, compute)
        at = at.astype(compute)
        centred = (at + half) * step - half
        place = at * step if corners else tirx.max(centred, zero) if clamp else centred
        return taps(place, kernel.size(size), compute)

    def sample(kernel: Kernel, at: Sequence[Any], read: Read) -> Any:
        axes = [along(kernel, place, n) for n, place in enumerate(at)]

        def blend(fixed: tuple[Any, ...], left: list[list[tuple[Any, Any]]]) -> Any:
            if not left:
                return convert(read(fixed), compute)
            parts = [blend((*fixed, element), left[1:]) * weight for element, weight in left[0]]
            return reduce(operator.add, parts)

        return convert(blend((), axes), view.dtype)

    return _resampled(lowering, node, view, shape, sample)


def _linear_taps(place: Any, size: Any, dtype: str) -> list[tuple[Any, Any]]:
    first = tirx.min(place.astype("int64"), size - 1)
    share = place - first.astype(dtype)
    return [(first, tirx.const(1.0, dtype) - share), (tirx.min(first + 1, size - 1), share)]


def _cubic_taps(place: Any, size: Any, dtype: str) -> list[tuple[Any, Any]]:
    """The convolution kernel of Keys (1981) with a = -0.75; elements beyond the border repeat it."""
    a = -0.75
    first = tirx.floor(place)
    share = place - first

    def weight(powers: tuple[float, float, float, float], x: Any) -> Any:
        cubic, square, linear, whole = (tirx.const(power, dtype) for power in powers)
        return ((cubic * x + square) * x + linear) * x + whole

    near, far = (a + 2, -(a + 3), 0.0, 1.0), (a, -5 * a, 8 * a, -4 * a)
    one = tirx.const(1.0, dtype)
    weights = [weight(far, share + one), weight(near, share), weight(near, one - share), weight(far, one - share + one)]
    start = first.astype("int64") - 1
    return [(tirx.max(tirx.min(start + n, size - 1), 0), each) for n, each in enumerate(weights)]


def _linear(lowering: Lowering, node: Node) -> View | Lazy:
    return _interpolated(lowering, node, _linear_taps, clamp=True)


def _cubic(lowering: Lowering, node: Node) -> View | Lazy:
    return _interpolated(lowering, node, _cubic_taps, clamp=False)


def _resampled(lowering: Lowering, node: Node, view: View, shape: Shape, sample: Sample) -> View | Lazy:
    """In the order in which the image lies: channels in vectors, or fused into what reads rows of planes."""
    if view.strides[1] == 1 and view.shape[1] != 1:
        spatial = tuple(range(1, len(shape) - 1))
        x = permuted(view, (0, *(axis + 1 for axis in spatial), 1))
        order = (0, len(shape) - 1, *spatial)
        return lowering.anchored(
            node, lambda result, end: resample(x, result, end, sample, "upsample", lowering.target), order=order
        )

    def element(kernel: Kernel, index: Index) -> Any:
        lead = (index.axis(0), index.axis(1))

        def read(spatial: Sequence[Any]) -> Any:
            return kernel.load(view, Index(view.shape, kernel.sizes, axes=(*lead, *spatial)))

        return sample(kernel, [index.axis(n) for n in range(2, len(shape))], read)

    return Lazy(shape, view.dtype, (view,), element, name="upsample")


TABLE: dict[Any, Callable[..., Any]] = {
    aten.upsample_nearest1d.vec: _nearest,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_nearest3d.vec: _nearest,
    aten.upsample_linear1d.vec: _linear,
    aten.upsample_bilinear2d.vec: _linear,
    aten.upsample_trilinear3d.vec: _linear,
    aten.upsample_bicubic2d.vec: _cubic,
}
