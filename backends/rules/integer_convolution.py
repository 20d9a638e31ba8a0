"""Direct convolution of 8-bit codes with int32 sums: `convolution` with words of neighbouring channels as its numbers.

A word is what `integer_gemm` multiplies at once. What is padded stands for the number 0, so its code is the zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.convolution import ConvolutionWriter, Direct, pack_filters
from graphopt.backends.rules.integer_gemm import Words, WordTile, in_words, words_of
from graphopt.backends.rules.pointwise import for_columns
from graphopt.backends.rules.register_tile import RegisterTile
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, fused_name

RULE = "integer-convolution"


def pack_filter_words(filters: np.ndarray, groups: int, columns: int, words: Words) -> np.ndarray:
    """Codes [O, C / groups, KH, KW] -> [panels, KH KW C / groups / codes, columns, codes], zero where outputs end."""
    inner = np.ascontiguousarray(filters.astype(words.weights).transpose(0, 2, 3, 1))
    whole = inner.view(np.uint32).transpose(0, 3, 1, 2)
    packed = np.ascontiguousarray(pack_filters(whole, groups, columns, True))
    return packed.view(words.weights).reshape(*packed.shape, words.codes)


def integer_convolution(direct: Direct, zero: int, result: Product, end: Any, name: str, target: Target) -> Code:
    """out[n, h, w, o] = sum over taps and channels of x weight in int32, then the tree `end` over `result`.

    As `convolution`, with x [N, H, W, C] stored as `words_of(target)` says, channels of a group in whole words, the
    weight packed by `pack_filter_words`, and the code `zero` outside of x.
    """
    choice, words = direct.choice, words_of(target)
    depth = int(product(direct.weight.shape[1:2] + direct.weight.shape[3:]))

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _IntegerConvolution(kernel, direct, zero, result, end, outputs[0], words).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [direct.x, direct.weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "lanes": target.lanes,
            "products": words.products,
            "block_rows": choice.block_rows,
            "row_groups": choice.row_groups,
            "panel_groups": choice.panel_groups,
            "taps": "row by row" if choice.chunked else "all",
            "input": "padded copy" if direct.padded else "in place",
        },
        flops=2 * depth * product(direct.outputs) + operations([end], target),
        extra_shapes=[direct.outputs],
    )


class _IntegerConvolution(ConvolutionWriter):
    sums = "int32"

    def __init__(
        self, kernel: Kernel, direct: Direct, zero: int, result: Product, end: Any, output: Output, words: Words
    ) -> None:
        x, weight = in_words(direct.x, words.codes), direct.weight
        whole = Direct(x, weight, direct.outputs, direct.window, direct.groups, direct.padded, direct.choice)
        super().__init__(kernel, whole, result, end, output)
        self.words = words
        self.bits, self.weights = kernel.words(x.storage, "uint32"), kernel.words(weight.storage, "uint32")
        codes = np.full(words.codes, zero, words.activations)
        self.outside = int(codes.view(np.uint32)[0])

    def tile(self) -> RegisterTile:
        return WordTile(self.kernel, self.choice.tile, self.words)

    def right(self, start: Any, lane: Any) -> Any:
        return self.weights[lane + start]

    def fill(self, buffer: Any, place: Any, count: Any) -> None:
        word = tirx.const(self.outside, "uint32")
        for_columns(self.kernel, count, lambda at: T.buffer_store(buffer, word, [place + at]))
