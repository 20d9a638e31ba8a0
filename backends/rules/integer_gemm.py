"""Packed-weight product of 8-bit codes with int32 sums: the float32 product with whole words in the place of numbers.

Where the target multiplies bytes (VNNI; SDOT and USDOT of Arm) a word is four codes: activations uint8 or, for SDOT,
int8, weights int8, up to 64 products an instruction. Other targets multiply two 16-bit numbers a word, activations less
their zero point, which is exact where a multiplication of bytes would saturate. The word of A is broadcast, the words
of a weight are packed [N / columns, K / codes, columns, codes]; tiles, shares and prefetching are those of `gemm` for a
depth in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.integer_instructions import multiply_quads, multiply_words
from graphopt.backends.kernel import Code, Kernel, Output, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.gemm import (
    Configuration,
    GemmWriter,
    candidates,
    configure,
    cost,
    pack_weight,
    worth_timing,
)
from graphopt.backends.rules.lanes import same, span
from graphopt.backends.rules.register_tile import RegisterTile, Tile
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "integer-gemm"
_RAGGED = 1.3  # time of a product of few steps whose last tile has fewer rows
_FEW_STEPS, _FEW_SUMS = 8, 12  # words of depth of a product whose epilogue costs more, vectors of sums of its tiles


@dataclass(frozen=True)
class Words:
    """How a target multiplies codes: `codes` of them in a 32-bit word, stored in these types.

    `temporaries` as in `tiles`: without an instruction for both, a product lies in a register before it is added, and
    NEON takes words apart.
    """

    codes: int
    activations: str
    weights: str
    multiply: Callable[..., Any]
    temporaries: int = 0

    @property
    def products(self) -> str:
        """What a kernel report calls them."""
        return f"{self.codes} codes of {self.activations}"


def words_of(target: Target) -> Words:
    if target.quads:
        return Words(4, target.quads, "int8", multiply_quads)
    return Words(2, "int16", "int16", multiply_words, 8 if target.lanes == 4 else 1)


class WordTile(RegisterTile):
    """int32 sums of products of words: `left` and `right` give uint32, `right` a vector of them."""

    def __init__(self, kernel: Kernel, tile: Tile, words: Words) -> None:
        super().__init__(kernel, tile, "int32")
        self.words = words

    def _steps(self, first: Any, left: Callable[[int, Any], Any], right: Callable[[Any, int, Any], Any]) -> None:
        """With NEON the steps of a row are one vector, whose lanes are multiplied by number."""
        if self.lanes != self.tile.steps:
            super()._steps(first, left, right)
            return
        whole = span(0, self.lanes)
        rows = [T.bind(left(r, span(first, self.lanes))) for r in range(self.tile.rows)]
        for step, r, c in itertools.product(range(self.lanes), range(self.tile.rows), range(self.tile.vectors)):
            total = self.words.multiply(
                self.values[r, c, whole], rows[r], right(first + step, c, whole), self.lanes, step
            )
            T.buffer_store(self.values, total, [r, c, whole])

    def _step(self, k: Any, left: Callable[[int, Any], Any], right: Callable[[Any, int, Any], Any]) -> None:
        whole = span(0, self.lanes)
        for r in range(self.tile.rows):
            word = same(left(r, k), self.lanes)
            for c in range(self.tile.vectors):
                total = self.words.multiply(self.values[r, c, whole], word, right(k, c, whole), self.lanes)
                T.buffer_store(self.values, total, [r, c, whole])

    def each_row(self, rows: Any, write: Callable[[Any], None]) -> None:
        """Rows that all exist are written without a branch between them: the sums of a few steps cost less than one."""
        if isinstance(rows, int):
            super().each_row(rows, write)
            return
        with T.If(rows >= self.tile.rows):
            with T.Then():
                super().each_row(self.tile.rows, write)
            with T.Else():
                super().each_row(rows, write)


def pack_words(weight: np.ndarray, columns: int, words: Words) -> np.ndarray:
    """Codes [N, K] -> [ceil(N / columns), ceil(K / codes), columns, codes], zero where N or K ends."""
    whole = np.pad(weight, ((0, 0), (0, -weight.shape[1] % words.codes))).astype(words.weights)
    packed = pack_weight(np.ascontiguousarray(whole).view(np.uint32), columns)
    return packed.view(words.weights).reshape(*packed.shape, words.codes)


def in_words(view: View, codes: int) -> View:
    """A view whose last axis is whole words of so many codes, counted in them."""
    *shape, last = view.shape
    *strides, one = view.strides
    assert int(last) % codes == 0 and one == 1, "the last axis is not whole words"
    return View(
        view.storage, (*shape, int(last) // codes), (*(stride // codes for stride in strides), 1), view.offset // codes
    )


def integer_gemm(
    a: View, weight: View, result: Product, end: Any, name: str, target: Target, choice: Configuration
) -> Code:
    """C[row, n] = sum over k of A[row, k] B[k, n] in int32, then the element-wise tree `end` over `result`.

    `a` [..., K] is stored as `words_of(target)` says, K, its offset and other strides whole words; `weight` is packed
    by `pack_words` for the columns of the tile of `choice`, a configuration for a depth in words.
    """
    words = words_of(target)
    rows, n = product(result.shape[:-1]), int(result.shape[-1])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _IntegerGemm(kernel, a, weight, result, end, outputs[0], choice, words).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [a, weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "steps": choice.tile.steps,
            "lanes": target.lanes,
            "products": words.products,
            "block_rows": choice.block_rows,
            "block_depth": choice.block_depth,
            "row_shares": choice.row_shares,
            "panel_shares": choice.panel_shares,
        },
        flops=2 * rows * n * int(a.shape[-1]) + operations([end], target),
    )


def offer(target: Target, a: View, n: int, end: Any, write: Callable[[Configuration], Code]) -> Choice[Configuration]:
    """What may be chosen for codes [..., K] times a weight [N, K], followed by the tree `end`."""
    words = words_of(target)
    rows, k = product(a.shape[:-1]), int(a.shape[-1]) // words.codes
    chosen = configure if k > _FEW_STEPS else _configure_few_steps
    parameters = {"rows": size_parameter(rows), "n": n, "k": k, "codes": words.codes, "contiguous": a.contiguous}
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        chosen(target, rows, n, k, words.temporaries),
        lambda: worth_timing(target, rows, n, k, words.temporaries),
        write,
    )


@cache
def _configure_few_steps(target: Target, rows: Size, n: int, k: int, temporaries: int) -> Configuration:
    """Tiles of fewer sums: those of few steps start before the ones before them are written, which hides latencies,
    and LLVM then keeps the panel in the registers that are left."""
    usual = configure(target, rows, n, k, temporaries)
    every = candidates(target, rows, n, k, [(usual.row_shares, usual.panel_shares)], temporaries=temporaries)
    small = [choice for choice in every if choice.tile.rows * choice.tile.vectors <= _FEW_SUMS]
    return min(small, key=lambda choice: _few_steps_cost(target, choice, rows, n, k))


def _few_steps_cost(target: Target, choice: Configuration, rows: Size, n: int, k: int) -> float:
    whole = isinstance(rows, int) and rows % choice.tile.rows == 0
    return cost(target, choice, rows, n, k) * (1 if whole else _RAGGED)


class _IntegerGemm(GemmWriter):
    def __init__(
        self,
        kernel: Kernel,
        a: View,
        weight: View,
        result: Product,
        end: Any,
        output: Output,
        choice: Configuration,
        words: Words,
    ) -> None:
        super().__init__(kernel, in_words(a, words.codes), weight, result, end, output, choice)
        self.words = words
        self.a, self.b = kernel.words(a.storage, "uint32"), kernel.words(weight.storage, "uint32")
        self.width = 4
        self.line //= self.width // np.dtype(words.weights).itemsize

    def registers(self, tile: Tile) -> RegisterTile:
        return WordTile(self.kernel, tile, self.words)

    def right(self, start: Any, lane: Any) -> Any:
        return self.b[lane + start]
