"""Depthwise convolution of feature maps stored channels last: each channel has its own window of weights.

A row of taps of a tile of P pixels loads each of its weights once and each input vector once, and does P multiply-adds
a tap: 3 x 3 with stride 1 and 14 pixels costs 19 loads for 42 multiply-adds, 7 x 7 27 loads for 98. One load a
multiply-add would be as fast, so the multiply-adds bound it, or the memory that holds the feature map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code, Kernel, Output, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.active_blocks import Gates
from graphopt.backends.rules.windows import (
    Configuration,
    Step,
    Window,
    Windows,
    configure,
    vector_width,
    worth_timing,
)
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "depthwise"


def pack_depthwise(weight: np.ndarray) -> np.ndarray:
    """[C, 1, taps...] -> [taps..., C]."""
    return np.moveaxis(weight[:, 0], 0, -1)


def depthwise(
    x: View,
    weight: View,
    result: Product,
    end: Any,
    window: Window,
    name: str,
    target: Target,
    gates: Gates | None = None,
    choice: Configuration | None = None,
    origin: int = 0,
) -> Code:
    """out[n, i..., c] = sum over taps t of x[n, i s - p + t d, c] weight[t, c], then the tree `end` over `result`.

    float32, `weight` also float16 or bfloat16; `x` [N, spatial axes, C] with channel stride 1, `weight` [taps..., C]
    contiguous, `result` [N, outputs..., C]. What lies outside `x` is zero. With `gates`, channels that take no part are
    left out and zero. `choice` is by default what `windows.configure` says. `x` may also be codes of 8 bits that stand
    for x - `origin`, and `weight` int8: sums of fewer than 514 products are exact.
    """
    choice = choice or configure(result.shape, window, target)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        filters = kernel.flat(weight.storage)
        channels = int(result.shape[-1])

        def multiply_add(step: Step) -> None:
            for pixel, tap in step.taps:
                with kernel.vectorized(step.width) as lane:
                    factor = filters[(step.first + tap) * channels + step.channel + lane].astype("float32")
                    total = step.accumulators[pixel, lane] + step.load(pixel, tap, lane) * factor
                    T.buffer_store(step.accumulators, total, [pixel, lane])

        Windows(kernel, x, window, result, end, outputs[0], gates, choice, origin).write(0.0, multiply_add)

    return write_kernel(
        RULE if gates is None else f"gated-{RULE}",
        fused_name(name, end),
        target,
        [x, weight, *(gates.reads if gates else ()), end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "pixels": choice.pixels,
            "lanes": vector_width(result.shape[-1], target),
            "channel_shares": choice.channel_shares,
        },
        flops=2 * product(result.shape) * product(window.taps) + operations([end], target),
        extra_shapes=[result.shape],
    )


def offer(
    x: View, weight: View, result: Product, end: Any, window: Window, name: str, target: Target, origin: int = 0
) -> Choice[Configuration]:
    """What may be chosen for the kernel that `depthwise` writes."""
    spatial = slice(len(result.shape) - len(window.taps) - 1, -1)
    parameters = {
        "outputs": "x".join(str(size_parameter(size)) for size in result.shape[spatial]),
        "inputs": "x".join(str(size_parameter(size)) for size in x.shape[spatial]),
        "batch": size_parameter(product(result.shape[: spatial.start])),
        "channels": size_parameter(result.shape[-1]),
        "dtype": f"{x.dtype} {weight.dtype}",
        **{name: "x".join(map(str, getattr(window, name))) for name in ("taps", "strides", "pads", "dilations")},
    }
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        configure(result.shape, window, target),
        lambda: worth_timing(result.shape, window, target),
        lambda choice: depthwise(x, weight, result, end, window, name, target, choice=choice, origin=origin),
    )
