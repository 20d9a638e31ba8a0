"""Images at another size: the nearest element, or linear interpolation along every spatial axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert
from graphopt.backends.rules.resampling import Read, Sample, resample
from graphopt.backends.sizes import Shape, shape_of
from graphopt.backends.values import Index, Lazy, View, permuted

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


def _linear(lowering: Lowering, node: Node) -> View | Lazy:
    """Half-pixel centres, or corner to corner with `align_corners`."""
    x, _, corners, factors = arguments(node).values()
    view, shape = lowering.view(x), shape_of(node.meta["val"])
    each = list(factors) if factors else [None] * (len(shape) - 2)
    compute = computed_in(view.dtype)
    zero, half, one = (tirx.const(number, compute) for number in (0.0, 0.5, 1.0))

    def neighbours(kernel: Kernel, at: Any, n: int) -> list[tuple[Any, Any]]:
        """The two elements along one axis and their weights."""
        size = view.shape[2 + n]
        step = _scale(kernel, size, shape[2 + n], each[n], corners, compute)
        at = at.astype(compute)
        place = at * step if corners else tirx.max((at + half) * step - half, zero)
        first = tirx.min(place.astype("int64"), kernel.size(size) - 1)
        share = place - first.astype(compute)
        return [(first, one - share), (tirx.min(first + 1, kernel.size(size) - 1), share)]

    def sample(kernel: Kernel, at: Sequence[Any], read: Read) -> Any:
        pairs = [neighbours(kernel, place, n) for n, place in enumerate(at)]

        def blend(axes: tuple[Any, ...], left: list[list[tuple[Any, Any]]]) -> Any:
            if not left:
                return convert(read(axes), compute)
            (low, low_share), (high, high_share) = left[0]
            below, above = blend((*axes, low), left[1:]), blend((*axes, high), left[1:])
            return below * low_share + above * high_share

        return convert(blend((), pairs), view.dtype)

    return _resampled(lowering, node, view, shape, sample)


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
}
