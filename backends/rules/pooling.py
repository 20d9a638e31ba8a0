"""Pooling of feature maps stored channels last: the largest element or the sum of every window, channels in vectors.

The work is one addition or one maximum a tap, so reading the feature map bounds it. The maximum instruction loses a NaN
in one of its operands: the sum of comparisons that find it is one for two taps, since they are made a row of taps at a
time, and a NaN that an accumulator holds stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Configuration, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.windows import Step, Window, Windows, configure, vector_width
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

RULE = "pooling"
_START = 0.0  # of sums
_LOWEST = {"uint8": 0, "int8": -128}


def pool(
    x: View, result: Product, end: Any, window: Window, combine: str, name: str, target: Target, origin: int = 0
) -> Code:
    """out[n, i..., c] = "sum" or "max" over the taps of window i inside `x`, then the tree `end` over `result`.

    `x` [N, spatial axes, C] or [spatial axes, C] with channel stride 1, of floats, or of 8-bit integers for "max";
    `result` has the same axes. Where it is int32, x holds integers that stand for x - `origin`, for "sum".
    """
    choice = configure(result.shape, window, target)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        windows = Windows(kernel, x, window, result, end, outputs[0], choice=choice, origin=origin)
        start = _LOWEST.get(x.dtype, -math.inf) if combine == "max" else _START
        windows.write(start, lambda step: _STEPS[combine](kernel, step))

    configuration = {
        "pixels": choice.pixels,
        "lanes": vector_width(result.shape[-1], target),
        "channel_shares": choice.channel_shares,
    }
    flops = product(window.taps) * product(result.shape)
    return _kernel(name, x, result, end, target, body, configuration, flops)


def adaptive_sum(x: View, result: Product, end: Any, spatial: int, name: str, target: Target) -> Code:
    """As many windows as outputs: window i of O over S elements goes from floor(i S / O) up to ceil((i + 1) S / O)."""
    ones = (1,) * spatial

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        windows = _Adaptive(kernel, x, Window(ones, ones, (0,) * spatial, ones), result, end, outputs[0])
        windows.write(_START, lambda step: _sum_row(kernel, step))

    configuration = {"pixels": 1, "lanes": vector_width(result.shape[-1], target)}
    return _kernel(name, x, result, end, target, body, configuration, product(x.shape))


def _kernel(
    name: str,
    x: View,
    result: Product,
    end: Any,
    target: Target,
    body: Callable[[Kernel, list[Output]], None],
    configuration: Configuration,
    flops: Size,
) -> Code:
    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [x, end],
        [(end.shape, end.dtype)],
        body,
        configuration=configuration,
        flops=flops + operations([end], target),
        extra_shapes=[result.shape],
    )


class _Adaptive(Windows):
    """Windows of different sizes, pixel by pixel."""

    def write_row(self) -> None:
        with self.kernel.serial(self.kernel.size(self.outputs)) as pixel:
            self.write_pixel(pixel)

    def span(self, axis: int, at: Any) -> tuple[Any, Any, Any]:
        size, count = (self.kernel.size(shape[self.lead + axis]) for shape in (self.x.shape, self.result.shape))
        first, end = tirx.truncdiv(at * size, count), tirx.truncdiv((at + 1) * size + count - 1, count)
        return first, int64(0), end - first


def _sum_row(kernel: Kernel, step: Step) -> None:
    for pixel, tap in step.taps:
        with kernel.vectorized(step.width) as lane:
            total = step.accumulators[pixel, lane] + step.load(pixel, tap, lane)
            T.buffer_store(step.accumulators, total, [pixel, lane])


def _max_row(kernel: Kernel, step: Step) -> None:
    for pixel, pairs in groupby(sorted(step.taps), key=lambda pair: pair[0]):
        taps = [tap for _, tap in pairs]
        with kernel.vectorized(step.width) as lane:
            values = [step.load(pixel, tap, lane) for tap in taps]
            T.buffer_store(step.accumulators, _largest(step.accumulators[pixel, lane], values), [pixel, lane])


_STEPS = {"sum": _sum_row, "max": _max_row}


def _largest(total: Any, values: list[Any]) -> Any:
    """The largest of all, NaN where any is; a comparison with NaN is false, so `total` stays where it is NaN."""
    numbers = []
    whole = str(total.ty.dtype) in _LOWEST
    for value in values:
        total = tirx.max(value, total)
        if not whole:
            numbers.append(value <= tirx.const(math.inf, value.ty.dtype))
    return total if whole else tirx.Select(tirx.all(*numbers), total, tirx.const(math.nan, total.ty.dtype))
