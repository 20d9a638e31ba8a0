"""Images at another size, stored channels last: one position and its weights a pixel, then channels in vectors.

A pixel's neighbours are as many streams of memory, so each is read whole: C channels beside each other, a load and at
most a multiply-add each. Positions and weights are scalars outside the loop over channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations, operations
from graphopt.backends.rules.windows import axes_at, vector_width
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, Product, View, fused_name

RULE = "resampling"
Read = Callable[[Sequence[Any]], Any]
Sample = Callable[[Kernel, Sequence[Any], Read], Any]


def resample(x: View, result: Product, end: Any, sample: Sample, name: str, target: Target) -> Code:
    """out[n, i..., c] = sample(kernel, i, read) where read(j) is x[n, j..., c], then the tree `end` over `result`.

    `x` and `result` are [N, spatial axes, C]; `x` has channel stride 1.
    """
    width = vector_width(result.shape[-1], target)

    def write(kernel: Kernel, output: Output, place: Sequence[Any], pixel: Any, channel: Any) -> None:
        def read(spatial: Sequence[Any]) -> Any:
            return kernel.load(x, Index(x.shape, kernel.sizes, axes=(place[0], *spatial, channel)))

        value = sample(kernel, place[1:], read)
        kernel.define(result, lambda _: value)
        index = Index(result.shape, kernel.sizes, axes=(*place, channel), row=pixel, column=channel)
        position = pixel * kernel.size(result.shape[-1]) + channel
        output.store(position, kernel.load(end, index.reshaped(end.shape)))

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        channels, columns = kernel.size(result.shape[-1]), kernel.size(result.shape[-2])
        with kernel.parallel(kernel.size(product(result.shape[:-2]))) as row, kernel.serial(columns) as column:
            place = (*axes_at(kernel, row, result.shape[:-2]), column)
            with kernel.serial(tirx.truncdiv(channels + (width - 1), int64(width))) as vector:
                first = tirx.min(vector * width, channels - width)
                with kernel.vectorized(width) as lane:
                    write(kernel, outputs[0], place, row * columns + column, first + lane)

    def one(kernel: Kernel) -> Any:
        spatial = tuple(tirx.Var(f"axis{number}", "int64") for number in range(len(result.shape) - 2))
        return sample(kernel, spatial, lambda _: tirx.Var("element", x.dtype))

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [x, end],
        [(end.shape, end.dtype)],
        body,
        configuration={"lanes": width},
        flops=count_operations(target, one) * product(result.shape) + operations([end], target),
        extra_shapes=[result.shape],
    )
