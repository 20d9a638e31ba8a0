"""graphopt::qsum and qavg_pool: exact int32 sums of codes, and their codes, in one reduction or over windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import Code
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, convert, like
from graphopt.backends.operators.integer_products import codes_of, constants, zero_of
from graphopt.backends.operators.pooling import covered_by, image_of, order_of, window_of
from graphopt.backends.operators.reduction import as_node, axes_of, reduce
from graphopt.backends.rules import pooling
from graphopt.backends.sizes import product
from graphopt.backends.values import Index, Lazy, Product, View
from graphopt.operators import integer_pooling  # noqa: F401
from graphopt.operators.integer_sums import sum_factor
from graphopt.operators.requantization import Requantization

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


def _sum(lowering: Lowering, node: Node) -> Lazy:
    given = arguments(node)
    held = constants(lowering, node, ("x_scale", "x_zero_point", "scale", "zero_point"))
    into = Requantization(held["scale"], held["zero_point"], None, given["qmin"], given["qmax"], given["dtype"], False)
    value = lowering.tensor(given["x"])
    axes = axes_of(given["dim"], len(value.shape))
    count = product(value.shape[axis] for axis in axes)
    zeros = count * zero_of(held["x_zero_point"])
    factor = float(sum_factor(held["x_scale"], held["scale"], given["divisor"]))

    def finish(kernel: Kernel, total: Any) -> Any:
        number = (total - like(total, zeros)).astype("float32")
        return codes_of(number * like(number, factor), into, 255 * count * factor)

    sums = reduce(lowering, cast(value, "int32"), axes, "int32", "sum", finish)
    return cast(as_node(node, sums, axes), DTYPES[into.dtype])


def _average_pool(lowering: Lowering, node: Node) -> View:
    given = arguments(node)
    held = constants(lowering, node, ("x_scale", "x_zero_point", "scale", "zero_point"))
    into = Requantization(held["scale"], held["zero_point"], None, given["qmin"], given["qmax"], given["dtype"], False)
    spatial, divisor = len(given["kernel_size"]), given["divisor"]
    window = window_of(given["kernel_size"], given["stride"], given["padding"], 1, spatial)
    factor = float(sum_factor(held["x_scale"], held["scale"], divisor or 1))
    view, zero = image_of(lowering, node, given["x"], spatial), zero_of(held["x_zero_point"])
    count = None if divisor else covered_by(window, view.shape[1:-1], False, 2)
    largest = 255 * product(window.taps) * factor

    def begin(total: Any) -> Lazy:
        def element(kernel: Kernel, index: Index) -> Any:
            number = kernel.load(total, index).astype("float32")
            number = number * like(number, factor)
            number = number if count is None else number / count(kernel, index).astype("float32")
            return convert(codes_of(number, into, largest), DTYPES[into.dtype])

        return Lazy(total.shape, DTYPES[into.dtype], (total,), element, sizes=view.shape[1:-1], name="requantize")

    def build(result: Product, end: Any) -> Code:
        return pooling.pool(view, result, end, window, "sum", f"qavg_pool{spatial}d", lowering.target, zero)

    return lowering.anchored(node, build, begin, order_of(2 + spatial, spatial), sums="int32")


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.graphopt.qsum.default: _sum}
POOLS: dict[Any, Callable[..., Any]] = {torch.ops.graphopt.qavg_pool.default: _average_pool}
