"""Images at another size: the nearest element, or linear interpolation along every spatial axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy

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


def _nearest(lowering: Lowering, node: Node) -> Lazy:
    x, _, factors = arguments(node).values()
    view, shape = lowering.view(x), shape_of(node.meta["val"])
    lead = 2
    spatial = len(shape) - lead
    each = list(factors) if factors else [None] * spatial

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(n) for n in range(lead)]
        for n in range(spatial):
            size = view.shape[lead + n]
            step = _scale(kernel, size, shape[lead + n], each[n], corners=False)
            position = (index.axis(lead + n).astype("float32") * step).astype("int64")
            axes.append(tirx.min(position, kernel.size(size) - 1))
        return kernel.load(view, Index(view.shape, kernel.sizes, axes=tuple(axes)))

    return Lazy(shape, view.dtype, (view,), element, name="upsample")


def _linear(lowering: Lowering, node: Node) -> Lazy:
    """Half-pixel centres, or corner to corner with `align_corners`."""
    x, _, corners, factors = arguments(node).values()
    view, shape = lowering.view(x), shape_of(node.meta["val"])
    lead = 2
    spatial = len(shape) - lead
    each = list(factors) if factors else [None] * spatial
    compute = computed_in(view.dtype)
    zero, half, one = (tirx.const(number, compute) for number in (0.0, 0.5, 1.0))

    def neighbours(kernel: Kernel, index: Index, n: int) -> list[tuple[Any, Any]]:
        """The two elements along one axis and their weights."""
        size = view.shape[lead + n]
        step = _scale(kernel, size, shape[lead + n], each[n], corners, compute)
        at = index.axis(lead + n).astype(compute)
        place = at * step if corners else tirx.max((at + half) * step - half, zero)
        first = tirx.min(place.astype("int64"), kernel.size(size) - 1)
        share = place - first.astype(compute)
        return [(first, one - share), (tirx.min(first + 1, kernel.size(size) - 1), share)]

    def element(kernel: Kernel, index: Index) -> Any:
        pairs = [neighbours(kernel, index, n) for n in range(spatial)]
        first = tuple(index.axis(n) for n in range(lead))

        def blend(axes: tuple[Any, ...], left: list[list[tuple[Any, Any]]]) -> Any:
            if not left:
                return convert(kernel.load(view, Index(view.shape, kernel.sizes, axes=axes)), compute)
            (low, low_share), (high, high_share) = left[0]
            below, above = blend((*axes, low), left[1:]), blend((*axes, high), left[1:])
            return below * low_share + above * high_share

        return convert(blend(first, pairs), view.dtype)

    return Lazy(shape, view.dtype, (view,), element, name="upsample")


TABLE: dict[Any, Callable[..., Any]] = {
    aten.upsample_nearest1d.vec: _nearest,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_nearest3d.vec: _nearest,
    aten.upsample_linear1d.vec: _linear,
    aten.upsample_bilinear2d.vec: _linear,
    aten.upsample_trilinear3d.vec: _linear,
}
