"""Pooling of feature maps stored channels last: the largest element or the mean of every window."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.approximations import is_nan
from graphopt.backends.kernel import Code, int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of
from graphopt.backends.operators.reduction import mean
from graphopt.backends.operators.windows import channels_last, each_axis, load_at
from graphopt.backends.rules import pooling as rule
from graphopt.backends.rules.generic import reduce_generic, start_value
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, Size, product, shape_of
from graphopt.backends.values import Index, Lazy, Product, View, inverse, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[["Lowering", Node], Any]
Covered = Callable[["Kernel", Index], Any]
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_BYTES = (torch.uint8, torch.int8)  # codes, whose largest is found as that of floats is


def window_of(size: Any, stride: Any, padding: Any, dilation: Any, spatial: int) -> Window:
    each = (tuple(each_axis(value, spatial)) for value in (size, stride or size, padding, dilation))
    return Window(*each)


def _max_pool(spatial: int) -> Lower:
    def lower(lowering: Lowering, node: Node) -> View:
        x, size, stride, padding, dilation, _ = arguments(node).values()
        if not node.meta["val"].is_floating_point() and node.meta["val"].dtype not in _BYTES:
            window = window_of(size, stride, padding, dilation, spatial)
            return _pool_of_integers(lowering, lowering.view(x), shape_of(node.meta["val"]), window, "max")
        view, window = image_of(lowering, node, x, spatial), window_of(size, stride, padding, dilation, spatial)

        def build(result: Product, end: Any) -> Code:
            return rule.pool(view, result, end, window, "max", f"max_pool{spatial}d", lowering.target)

        return lowering.anchored(node, build, order=order_of(rank_of(node), spatial))

    return lower


def _max_pool_with_positions(spatial: int) -> Lower:
    """The largest elements, and the place of the first of them in its plane, counted without padding."""

    def lower(lowering: Lowering, node: Node) -> tuple[View, View | None]:
        x, size, stride, padding, dilation, _ = arguments(node).values()
        window, shape = window_of(size, stride, padding, dilation, spatial), shape_of(node.meta["val"][0])
        read = any(user.args[1] == 1 for user in node.users)
        if not node.meta["val"][0].is_floating_point():
            plain = lowering.view(x)
            best = _pool_of_integers(lowering, plain, shape, window, "max")
            return best, _positions(lowering, plain, best, window) if read else None
        view = image_of(lowering, node, x, spatial)
        order = order_of(len(shape), spatial)
        result = Product(tuple(shape[axis] for axis in inverse(order)), view.dtype)
        code = rule.pool(view, result, result, window, "max", f"max_pool{spatial}d", lowering.target)
        best = permuted(lowering.call(code)[0], order)
        return best, _positions(lowering, permuted(view, order), best, window) if read else None

    return lower


def _pool_of_integers(lowering: Lowering, x: View, shape: Shape, window: Window, combine: str) -> View:
    """ "max" or "sum" over windows, as plain loops: the pooling rule is for floats."""
    lead = len(shape) - len(window.taps)

    def element(kernel: Kernel, index: Index, taps: tuple[Any, ...]) -> Any:
        axes, inside = _tap(kernel, x, index, taps, window)
        return tirx.Select(tirx.all(*inside), load_at(kernel, x, axes), start_value(combine, x.dtype))

    name = f"{combine}_pool{len(shape) - lead}d"
    return reduce_generic(lowering, name, shape, x.dtype, window.taps, (x,), element, combine)


def _tap(
    kernel: Kernel, x: View, index: Index, taps: tuple[Any, ...], window: Window
) -> tuple[tuple[Any, ...], list[Any]]:
    """Where a tap of the window at `index` reads, kept inside `x`, and the conditions under which it is inside."""
    lead, inside = len(x.shape) - len(taps), []
    axes = [index.axis(number) for number in range(lead)]
    for n, tap in enumerate(taps):
        at = index.axis(lead + n) * window.strides[n] - window.pads[n] + tap * window.dilations[n]
        last = kernel.size(x.shape[lead + n]) - 1
        inside += [at >= 0, at <= last]
        axes.append(tirx.max(tirx.min(at, last), int64(0)))
    return tuple(axes), inside


def _positions(lowering: Lowering, x: View, best: View, window: Window) -> View:
    lead = len(x.shape) - len(window.taps)

    def element(kernel: Kernel, index: Index, taps: tuple[Any, ...]) -> Any:
        axes, inside = _tap(kernel, x, index, taps, window)
        place = int64(0)
        for number in range(lead, len(axes)):
            place = place * kernel.size(x.shape[number]) + axes[number]
        value = convert(load_at(kernel, x, axes), computed_in(x.dtype))
        wanted = convert(kernel.load(best, index), computed_in(x.dtype))
        found = tirx.EQ(value, wanted)
        found = tirx.any(found, is_nan(value)) if x.dtype in _FLOATS else found
        return tirx.Select(tirx.all(*inside, found), place, tirx.max_value("int64"))

    return reduce_generic(lowering, "max_pool_positions", best.shape, "int64", window.taps, (x, best), element, "min")


def _average_pool(spatial: int) -> Lower:
    """Windows that stick out divide by what they cover, with the padding or without."""

    def lower(lowering: Lowering, node: Node) -> View | Lazy:
        x, size, stride, padding, ceil, include, *divisor = arguments(node).values()
        window, lead = window_of(size, stride, padding, 1, spatial), rank_of(node) - spatial
        whole = not node.meta["val"].is_floating_point()
        view = lowering.view(x) if whole else image_of(lowering, node, x, spatial)
        extents = view.shape[lead:] if whole else view.shape[lead - 1 : -1]
        if divisor and divisor[0]:
            count: int | Covered = int(divisor[0])
        elif not ceil and (include or not any(window.pads)):
            count = int(product(window.taps))
        else:
            count = covered_by(window, extents, bool(include), lead)
        if whole:
            total = _pool_of_integers(lowering, view, shape_of(node.meta["val"]), window, "sum")
            return _over(total, count, extents)

        def build(result: Product, end: Any) -> Code:
            return rule.pool(view, result, end, window, "sum", f"avg_pool{spatial}d", lowering.target)

        return lowering.anchored(
            node, build, lambda total: _over(total, count, extents), order_of(rank_of(node), spatial)
        )

    return lower


def covered_by(window: Window, extents: Shape, include: bool, lead: int) -> Covered:
    """Elements of a window inside the input, with the padding that a window covers or without."""

    def covered(kernel: Kernel, index: Index) -> Any:
        count = int64(1)
        for n, extent in enumerate(extents):
            size = kernel.size(extent)
            start = index.axis(lead + n) * window.strides[n] - window.pads[n]
            end = tirx.min(start + window.taps[n], size + window.pads[n])
            if not include:
                start, end = tirx.max(start, int64(0)), tirx.min(end, size)
            count = count * (end - start)
        return count

    return covered


def _adaptive_average_pool(spatial: int) -> Lower:
    """Window i covers floor(i S / O) up to ceil((i + 1) S / O)."""

    def lower(lowering: Lowering, node: Node) -> View:
        shape = shape_of(node.meta["val"])
        lead = len(shape) - spatial
        if all(size == 1 for size in shape[lead:]):
            return mean(lowering, lowering.tensor(node.args[0]), list(range(lead, len(shape))), shape)
        view = image_of(lowering, node, node.args[0], spatial)
        extents, counts = view.shape[lead - 1 : -1], shape[lead:]

        def covered(kernel: Kernel, index: Index) -> Any:
            total = int64(1)
            for n, sizes in enumerate(zip(extents, counts, strict=True)):
                size, count = (kernel.size(each) for each in sizes)
                at = index.axis(lead + n)
                first = tirx.truncdiv(at * size, count)
                total = total * (tirx.truncdiv((at + 1) * size + count - 1, count) - first)
            return total

        def build(result: Product, end: Any) -> Code:
            name = f"adaptive_avg_pool{spatial}d"
            if taps := _equal_windows(extents, counts):
                window = Window(taps, taps, (0,) * spatial, (1,) * spatial)
                return rule.pool(view, result, end, window, "sum", name, lowering.target)
            return rule.adaptive_sum(view, result, end, spatial, name, lowering.target)

        equal = int(product(_equal_windows(extents, counts)))
        divisor: int | Covered = equal if _equal_windows(extents, counts) else covered
        return lowering.anchored(
            node, build, lambda total: _over(total, divisor, extents), order_of(rank_of(node), spatial)
        )

    return lower


def _equal_windows(sizes: Shape, counts: Shape) -> tuple[int, ...]:
    """How many elements each output covers along each axis where it is the same for all, otherwise nothing."""
    pairs = list(zip(sizes, counts, strict=True))
    if not all(isinstance(size, int) and isinstance(count, int) and size % count == 0 for size, count in pairs):
        return ()
    return tuple(int(size) // int(count) for size, count in pairs)


def _over(total: Any, count: int | Covered, sizes: tuple[Size, ...]) -> Lazy:
    """The total of each window divided by what it covers."""

    def element(kernel: Kernel, index: Index) -> Any:
        value = convert(kernel.load(total, index), computed_in(total.dtype))
        number = int64(count) if isinstance(count, int) else count(kernel, index)
        number = number.astype(dtype_of(value))
        return convert(value / number if total.dtype in _FLOATS else tirx.truncdiv(value, number), total.dtype)

    return Lazy(total.shape, total.dtype, (total,), element, sizes=sizes)


def image_of(lowering: Lowering, node: Node, argument: Any, spatial: int) -> View:
    """[N, spatial axes, C] or [spatial axes, C] with channel stride 1."""
    value = lowering.tensor(argument)
    if value.dtype not in _FLOATS and node.meta["val"].dtype not in _BYTES:
        raise CompileError(f"{node.name} pools {value.dtype}; floats have a lowering")
    return channels_last(lowering, value, spatial)


def rank_of(node: Node) -> int:
    return len(node.meta["val"].shape)


def order_of(rank: int, spatial: int) -> tuple[int, ...]:
    """The axes of the node in a kernel's result [N, spatial axes, C] or [spatial axes, C]."""
    spatial_axes = range(rank - 1 - spatial, rank - 1)
    return (*range(spatial_axes.start), spatial_axes.stop, *spatial_axes)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.avg_pool1d.default: _average_pool(1),
    aten.avg_pool2d.default: _average_pool(2),
    aten.avg_pool3d.default: _average_pool(3),
    aten.adaptive_avg_pool1d.default: _adaptive_average_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool(2),
    aten.adaptive_avg_pool3d.default: _adaptive_average_pool(3),
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool(2),
    aten._adaptive_avg_pool3d.default: _adaptive_average_pool(3),
    aten.max_pool2d_with_indices.default: _max_pool_with_positions(2),
    aten.max_pool3d_with_indices.default: _max_pool_with_positions(3),
}
