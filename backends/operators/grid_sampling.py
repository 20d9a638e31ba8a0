"""Images read at positions that a tensor gives: nearest element, bilinear or bicubic interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, like
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)
_CUBIC = -0.75  # Keys' parameter, as in PyTorch


def _grid_sampler(lowering: Lowering, node: Node) -> Lazy:
    """x [N, C, H, W] at grid [N, P, Q, 2], (column, row) from -1 to 1; the result is [N, C, P, Q]."""
    argument, grid_argument, mode, padding, corners = arguments(node).values()
    x, grid = lowering.view(argument), lowering.view(grid_argument)
    compute = computed_in(x.dtype)

    def element(kernel: Kernel, index: Index) -> Any:
        batch, channel, *pixel = (index.axis(number) for number in range(4))
        sizes = [kernel.size(size) for size in x.shape[2:]]

        def place(axis: int) -> Any:
            number = Index(grid.shape, kernel.sizes, axes=(batch, *pixel, int64(1 - axis)))
            at, size = convert(kernel.load(grid, number), compute), sizes[axis].astype(compute)
            one, half = like(at, 1), like(at, 0.5)
            return (at + one) * half * (size - one) if corners else ((at + one) * size - one) * half

        def read(row: Any, column: Any) -> Any:
            """Whole numbers as floats; 0 outside."""
            inside, axes = [], []
            for at, size in zip((row, column), sizes, strict=True):
                inside += [at >= like(at, 0), at <= (size - 1).astype(compute)]
                axes.append(tirx.max(tirx.min(at.astype("int64"), size - 1), int64(0)))
            value = convert(kernel.load(x, Index(x.shape, kernel.sizes, axes=(batch, channel, *axes))), compute)
            return tirx.Select(tirx.all(*inside), value, like(value, 0))

        def bordered(at: Any, axis: int) -> Any:
            return T.bind(_bordered(at, sizes[axis].astype(compute), padding, corners))

        places = [T.bind(place(axis)) for axis in (0, 1)]
        if mode == _BICUBIC:
            taps = [_cubic_taps(at) for at in places]
            taps = [[(bordered(at, axis), weight) for at, weight in taps[axis]] for axis in (0, 1)]
        else:
            places = [bordered(at, axis) for axis, at in enumerate(places)]
            taps = [_nearest_tap(at) if mode == _NEAREST else _linear_taps(at) for at in places]
        total = None
        for row, row_weight in taps[0]:
            for column, column_weight in taps[1]:
                term = read(row, column) * (row_weight * column_weight)
                total = term if total is None else total + term
        return convert(total, x.dtype)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x, grid), element, sizes=x.shape)


def _bordered(at: Any, size: Any, padding: int, corners: bool) -> Any:
    """The position inside the image that one outside stands for."""
    if padding == _ZEROS:
        return at
    zero, one, last = like(at, 0), like(at, 1), size - like(at, 1)
    if padding == _REFLECTION:
        low, span = (zero, last) if corners else (like(at, -0.5), size)
        distance = T.bind(tirx.abs(at - low))
        flips = T.bind(tirx.floor(distance / tirx.Select(span > zero, span, one)))
        extra = T.bind(distance - flips * span)
        even = tirx.EQ(flips - tirx.floor(flips * like(at, 0.5)) * like(at, 2), zero)
        at = T.bind(tirx.Select(even, extra, span - extra) + low)
    return tirx.max(tirx.min(at, last), zero)


def _nearest_tap(at: Any) -> list[tuple[Any, Any]]:
    return [(T.bind(tirx.nearbyint(at)), like(at, 1))]


def _linear_taps(at: Any) -> list[tuple[Any, Any]]:
    first = T.bind(tirx.floor(at))
    share = T.bind(at - first)
    return [(first, like(at, 1) - share), (first + like(at, 1), share)]


def _cubic_taps(at: Any) -> list[tuple[Any, Any]]:
    first = T.bind(tirx.floor(at))
    share = T.bind(at - first)
    a, one = like(at, _CUBIC), like(at, 1)

    def near(x: Any) -> Any:
        return ((a + like(x, 2)) * x - (a + like(x, 3))) * x * x + one

    def far(x: Any) -> Any:
        return ((a * x - like(x, 5) * a) * x + like(x, 8) * a) * x - like(x, 4) * a

    weights = far(share + one), near(share), near(one - share), far(like(at, 2) - share)
    return [(first + like(at, number - 1), T.bind(weight)) for number, weight in enumerate(weights)]


TABLE: dict[Any, Callable[..., Any]] = {aten.grid_sampler_2d.default: _grid_sampler}
