"""graphopt::qsum: exact int32 sums of codes, and their codes, in one reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, like
from graphopt.backends.operators.integer_products import codes_of, constants, zero_of
from graphopt.backends.operators.reduction import as_node, axes_of, reduce
from graphopt.backends.sizes import product
from graphopt.backends.values import Lazy
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


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.graphopt.qsum.default: _sum}
