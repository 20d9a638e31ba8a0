"""graphopt::dynamic_qlinear: the integer product of `qlinear`, with scale and zero point read when it runs.

Sums run over the codes as they are stored. What a zero point is too much is zero_point * (sum of an output's weights),
the latter a constant; it is subtracted from the finished sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import like
from graphopt.backends.operators.integer_products import (
    constants,
    in_whole_words,
    packed_integer_product,
    stored_codes,
)
from graphopt.backends.operators.shifted_weights import Shifted, missing_of_rows
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.values import Index, Lazy, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


def _dynamic_linear(lowering: Lowering, node: Node) -> View:
    given, held = arguments(node), constants(lowering, node, ("weight", "weight_scale", "bias"))
    weight, scale, bias = held["weight"], held["weight_scale"], held["bias"]
    words = words_of(lowering.target)
    value, shift = stored_codes(lowering.tensor(given["x"]), 0, words)
    shifted, missing = Shifted.of(weight), None
    if shifted.shift is not None:
        value = lowering.view(value)
        missing = missing_of_rows(lowering, shifted.shift, value, 0)
    a = in_whole_words(lowering, value, words.codes)
    step, zero = (lowering.view(given[name]) for name in ("x_scale", "x_zero_point"))
    totals = lowering.weight(weight.to(torch.int64).sum(1).to(torch.int32))
    factor = lowering.weight(scale) if scale.ndim else float(scale)
    added = None if bias is None else lowering.weight(bias)

    def begin(result: Any) -> Lazy:
        def element(kernel: Kernel, index: Index) -> Any:
            output = index.axis(len(result.shape) - 1)

            def each(value: Any) -> Any:
                return kernel.flat(value.storage)[output] if isinstance(value, View) else tirx.const(value, "float32")

            def of_row(value: View) -> Any:
                axes = [index.axis(number) for number in range(len(result.shape) - 1)] if value.shape else []
                place = (*axes, int64(0)) if value.shape else ()
                return kernel.load(value, Index(value.shape, kernel.sizes, axes=place))

            low = of_row(zero).astype("int32")
            low = low + like(low, shift) if shift else low
            total = kernel.load(result, index).astype("int32") - low * each(totals)
            total = total if missing is None else total + missing.at(kernel, index)
            number = total.astype("float32") * (of_row(step) * each(factor))
            return number if added is None else number + each(added)

        read = [value for value in (step, zero, totals, factor, added) if isinstance(value, View)]
        read += [missing.shift, missing.sums] if missing else []
        return Lazy(result.shape, "float32", (result, *read), element, name="dequantize")

    n, k = weight.shape
    return packed_integer_product(lowering, node, a, shifted.codes, begin, f"dynamic_qlinear_{n}x{k}")


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.dynamic_qlinear.default: _dynamic_linear,
}
