"""graphopt::dynamic_qlinear and dynamic_qconv: those of `qlinear` and `qconv`, scale and zero point read as they run.

Sums run over the codes as they are stored. What a zero point is too much is zero_point * (sum of an output's weights),
the latter a constant; it is subtracted from the finished sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.kernel import int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, like
from graphopt.backends.operators.integer_convolution import (
    ORDER,
    channels_last,
    exact_in_float,
    packed_convolution,
    sums_by_loops,
)
from graphopt.backends.operators.integer_products import (
    constants,
    in_whole_words,
    packed_integer_product,
    stored_codes,
)
from graphopt.backends.operators.shifted_weights import Missing, Shifted, missing_of_rows, missing_of_windows
from graphopt.backends.rules import depthwise
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Value, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


def _dynamic_linear(lowering: Lowering, node: Node) -> View:
    given, held = arguments(node), constants(lowering, node, ("weight", "weight_scale", "bias"))
    weight, words = held["weight"], words_of(lowering.target)
    value, shift = stored_codes(lowering.tensor(given["x"]), 0, words)
    shifted, missing = Shifted.of(weight), None
    if shifted.shift is not None:
        value = lowering.view(value)
        missing = missing_of_rows(lowering, shifted.shift, value, 0)
    a = in_whole_words(lowering, value, words.codes)
    begin = _ending(lowering, given, held, shift, missing, -1)
    n, k = weight.shape
    return packed_integer_product(lowering, node, a, shifted.codes, begin, f"dynamic_qlinear_{n}x{k}")


def _dynamic_convolution(lowering: Lowering, node: Node) -> Any:
    """Codes are padded with their zero point as they are stored; where channels are no words, zero points go first."""
    given, held = arguments(node), constants(lowering, node, ("weight", "weight_scale", "bias"))
    weight, groups, words = held["weight"], int(given["groups"]), words_of(lowering.target)
    strides, pads, dilations = (tuple(int(n) for n in given[name]) for name in ("stride", "padding", "dilation"))
    window = Window(tuple(weight.shape[2:]), strides, pads, dilations)
    outputs, inputs = (int(size) for size in weight.shape[:2])
    name = f"dynamic_qconv_{'x'.join(map(str, weight.shape))}"
    zero = lowering.view(given["x_zero_point"])
    if groups > 1 and inputs == 1 and groups == outputs and exact_in_float(weight):
        centered = channels_last(lowering, _centered(lowering.tensor(given["x"]), zero, "float32"), 1)
        packed = lowering.weight(weight, "depthwise", depthwise.pack_depthwise)
        return lowering.anchored(
            node,
            lambda result, end: lowering.choose(
                depthwise.offer(centered, packed, result, end, window, name, lowering.target)
            ),
            _ending(lowering, given, held, None, None, 1),
            ORDER,
            sums="float32",
        )
    shape = shape_of(node.meta["val"])
    if groups > 1 and inputs % words.codes:
        x = lowering.view(_centered(lowering.tensor(given["x"]), zero, "int32"))
        sums = sums_by_loops(lowering, shape, x, lowering.weight(weight), 0, window, groups)
        return _ending(lowering, given, held, None, None, 1)(sums)
    value, shift = stored_codes(lowering.tensor(given["x"]), 0, words)
    value = _padded(value, zero, shift, pads) if any(pads) else value
    x = channels_last(lowering, value, words.codes)
    inside, shifted, missing = replace(window, pads=(0, 0)), Shifted.of(weight), None
    if shifted.shift is not None:
        channels = inputs * groups
        missing = missing_of_windows(lowering, shifted.shift, x, 0, channels, groups, inside, shape)
    begin = _ending(lowering, given, held, shift, missing, 1)
    return packed_convolution(lowering, node, x, shifted.codes, inside, groups, False, 0, begin, name)


def _centered(value: Value, zero: View, dtype: str) -> Lazy:
    """Codes less a zero point that is computed."""

    def element(kernel: Kernel, index: Index) -> Any:
        at = Index(zero.shape, kernel.sizes, axes=())
        code, origin = (x.astype("int32") for x in (kernel.load(value, index), kernel.load(zero, at)))
        return convert(code - origin, dtype)

    return Lazy(value.shape, dtype, (value, zero), element, name="center")


def _padded(value: Value, zero: View, shift: int, pads: tuple[int, ...]) -> Lazy:
    """Stored codes [N, C, H, W] with the zero point, which `shift` is added to as it was to them, around them."""
    shape = (*value.shape[:2], *(size + 2 * pad for size, pad in zip(value.shape[2:], pads, strict=True)))

    def element(kernel: Kernel, index: Index) -> Any:
        axes, inside = [index.axis(0), index.axis(1)], []
        for number, pad in enumerate(pads):
            at, last = index.axis(2 + number) - pad, kernel.size(value.shape[2 + number]) - 1
            inside += [at >= 0, at <= last]
            axes.append(tirx.max(tirx.min(at, last), int64(0)))
        code = kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(axes)))
        outside = kernel.load(zero, Index(zero.shape, kernel.sizes, axes=())).astype("int32")
        return tirx.Select(tirx.all(*inside), code, convert(outside + like(outside, shift), value.dtype))

    return Lazy(shape, value.dtype, (value, zero), element, name="pad")


def _ending(
    lowering: Lowering, given: Mapping[str, Any], held: Mapping[str, Any], shift: int | None, missing: Missing | None,
    axis: int,
) -> Callable[[Any], Lazy]:  # fmt: skip
    """From sums to numbers; they are of stored codes, which are `shift` more, or of codes less the zero point, where
    that is None. `axis` is that of the outputs."""
    weight, scale, bias = held["weight"], held["weight_scale"], held["bias"]
    step, zero = (lowering.view(given[name]) for name in ("x_scale", "x_zero_point"))
    totals = None if shift is None else lowering.weight(weight.flatten(1).to(torch.int64).sum(1).to(torch.int32))
    factor = lowering.weight(scale) if scale.ndim else float(scale)
    added = None if bias is None else lowering.weight(bias)

    def begin(result: Any) -> Lazy:
        def element(kernel: Kernel, index: Index) -> Any:
            output = index.axis(axis % len(result.shape))

            def each(value: Any) -> Any:
                return kernel.flat(value.storage)[output] if isinstance(value, View) else tirx.const(value, "float32")

            def of_row(value: View) -> Any:
                axes = [index.axis(number) for number in range(len(result.shape) - 1)] if value.shape else []
                place = (*axes, int64(0)) if value.shape else ()
                return kernel.load(value, Index(value.shape, kernel.sizes, axes=place))

            total = kernel.load(result, index)
            if totals is not None:
                low = of_row(zero).astype("int32")
                low = low + like(low, shift) if shift else low
                total = total.astype("int32") - low * each(totals)
            total = total if missing is None else total + missing.at(kernel, index)
            number = total.astype("float32") * (of_row(step) * each(factor))
            return number if added is None else number + each(added)

        read = [value for value in (step, zero, totals, factor, added) if isinstance(value, View)]
        read += [missing.shift, missing.sums] if missing else []
        return Lazy(result.shape, "float32", (result, *read), element, name="dequantize")

    return begin


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.dynamic_qlinear.default: _dynamic_linear,
    torch.ops.graphopt.dynamic_qconv.default: _dynamic_convolution,
}
