"""Depthwise convolution of codes with VNNI: a word is one channel under up to four rows of taps.

Three or four rows of 64 channels become four vectors of words, in the order of the channels, with a permutation each
and eight interleavings. A column of words serves every pixel that has it under one of its columns of taps, with one
multiplication for each vector. A pixel of 3 x 3 taps costs 3 multiplications and 3 shuffles a vector of 16 channels,
where float32 takes 9 multiply-adds and 12 conversions.

What lies outside of x has the code that stands for 0. Channels are taken 64 at a time, the last ones of a pixel again
where 64 does not divide their number. Weights lie as the words they multiply, for each of these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.code_instructions import joined, turned
from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.code_stores import store_codes
from graphopt.backends.rules.depthwise import RULE
from graphopt.backends.rules.windows import Configuration, Window, Windows, configure, worth_timing
from graphopt.backends.sizes import Shape, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

CHANNELS = 64  # of a block
_ROWS, _LANES = 4, 16  # rows of taps in a word, words of a vector
_VECTORS = CHANNELS // _LANES
_MOST_PIXELS = 8  # of a tile by default: each has code of its own


def fits(x: Shape, outputs: Shape, target: Target) -> bool:
    """Whether there is a kernel for images [N, C, H, W] and outputs: enough channels, and rows of a known size."""
    known = all(isinstance(size, int) for size in (x[1], x[3], outputs[3]))
    return target.quads == "uint8" and target.lanes == _LANES and known and int(x[1]) >= CHANNELS


def pack_depthwise_words(weight: np.ndarray) -> np.ndarray:
    """int8 [C, 1, KH, KW] -> [blocks, KW, ceil(KH / 4), 64, 4], with zeros under rows that do not exist."""
    channels, _, rows, columns = weight.shape
    padded = np.pad(weight[:, 0], ((0, 0), (0, -rows % _ROWS), (0, 0)))
    words = padded.reshape(channels, -1, _ROWS, columns).transpose(3, 1, 0, 2)
    starts = [min(first, channels - CHANNELS) for first in range(0, channels, CHANNELS)]
    return np.stack([words[:, :, start : start + CHANNELS] for start in starts])


def offer(
    x: View, weight: View, result: Product, end: Any, window: Window, name: str, target: Target, zero: int
) -> Choice[Configuration]:
    """What may be chosen for x [N, H, W, C] of uint8 whose code `zero` stands for 0, and `weight` packed as above.

    `result` [N, OH, OW, C] has the int32 sums of codes times weights, that of `zero` outside of x.
    """
    usual = configure(result.shape, window, target)
    parameters = {
        "outputs": "x".join(str(size_parameter(size)) for size in result.shape[1:-1]),
        "inputs": "x".join(str(size_parameter(size)) for size in x.shape[1:-1]),
        "batch": size_parameter(result.shape[0]),
        "channels": size_parameter(result.shape[-1]),
        "codes": _ROWS,
        **{name: "x".join(map(str, getattr(window, name))) for name in ("taps", "strides", "pads", "dilations")},
    }
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        Configuration(_pixels(int(result.shape[-2])), usual.channel_shares),
        lambda: [choice for choice in worth_timing(result.shape, window, target) if choice.pixels <= 2 * _MOST_PIXELS],
        lambda choice: _depthwise_words(x, weight, result, end, window, name, target, zero, choice),
    )


def _pixels(outputs: int) -> int:
    """As many as a tile may have, such that few are computed twice at the end of a row."""
    most = min(outputs, _MOST_PIXELS)
    return min(range(most, most // 2, -1), key=lambda pixels: (-(-outputs // pixels) * pixels, -pixels))


def _depthwise_words(
    x: View,
    weight: View,
    result: Product,
    end: Any,
    window: Window,
    name: str,
    target: Target,
    zero: int,
    choice: Configuration,
) -> Code:
    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _WordWindows(kernel, x, weight, window, result, end, outputs[0], choice, zero).write_blocks()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [x, weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "pixels": choice.pixels,
            "lanes": _LANES,
            "products": "4 codes of uint8",
            "channel_shares": choice.channel_shares,
        },
        flops=2 * product(result.shape) * product(window.taps) + operations([end], target),
        extra_shapes=[result.shape],
    )


class _WordWindows(Windows):
    """The loops of windows with tiles of words; a row of outputs is one of `result`."""

    def __init__(
        self,
        kernel: Kernel,
        x: View,
        weight: View,
        window: Window,
        result: Product,
        end: Any,
        output: Output,
        choice: Configuration,
        zero: int,
    ) -> None:
        super().__init__(kernel, x, window, result, end, output, choice=choice)
        self.width, self.zero = CHANNELS, zero
        self.weights = kernel.words(weight.storage, "uint32")
        self.words = -(-window.taps[0] // _ROWS)

    def write_blocks(self) -> None:
        self.write(0, lambda step: None)

    def write_row(self) -> None:
        """Tiles with all rows of taps inside of x, which most are, know that."""
        kernel, window = self.kernel, self.window
        height = kernel.size(self.x.shape[1])
        corner = T.bind(self.place[1] * window.strides[0] - window.pads[0])
        rows = [corner + tap * window.dilations[0] for tap in range(window.taps[0])]
        strides = [kernel.size(stride) for stride in self.x.strides]
        base = kernel.size(self.x.offset) + self.place[0] * strides[0] + self.channel
        self.rows = [
            (base + tirx.max(tirx.min(row, height - 1), int64(0)) * strides[1], tirx.all(row >= 0, row < height))
            for row in rows
        ]
        self.all_inside = True
        if window.taps[0] == 1 and not window.pads[0]:
            self.write_tiles()
            return
        with T.If(tirx.all(rows[0] >= 0, rows[-1] < height)):
            with T.Then():
                self.write_tiles()
            with T.Else():
                self.all_inside = False
                self.write_tiles()

    def write_tiles(self) -> None:
        for run in self.every_run():
            if run.tiles == 1:
                self.write_tile(int64(run.start), run.taps)
                continue
            with self.kernel.serial(run.tiles) as tile:
                self.write_tile(tile * self.pixels + run.start, run.taps)

    def write_tile(self, first: Any, taps: Sequence[tuple[int, int]]) -> None:
        """Columns of words from left to right; a pixel is stored once its last one has been multiplied."""
        sums = self.kernel.registers(self.pixels, _VECTORS, _LANES, dtype="int32")
        whole = tirx.Ramp(int64(0), int64(1), _LANES)
        corner = first * self.window.strides[1] - self.window.pads[1]
        column, words = -1, list[list[Any]]()
        for pixel, tap in self.taps():
            at = self.window.covers(pixel, tap)
            if at != column:
                exists = any(self.window.covers(*pair) == at for pair in taps)
                column, words = at, self.column(corner + at, exists) if exists or self.zero else []
            for vector in range(_VECTORS):
                total = tirx.Broadcast(tirx.const(0, "int32"), _LANES) if tap == 0 else sums[pixel, vector, whole]
                for number, word in enumerate(words):
                    weight = self.weights[tirx.Ramp(self.weight_place(tap, number, vector), int64(1), _LANES)]
                    total = multiply_quads(total, word[vector], weight, _LANES)
                T.buffer_store(sums, total, [pixel, vector, whole])
            if tap == self.window.taps[1] - 1:
                self.finish_pixel(sums, pixel, first + pixel)

    def column(self, column: Any, inside: bool) -> list[list[Any]]:
        """The words of one column of x: for each four rows of taps the vectors of a block of channels."""
        outside = tirx.Broadcast(tirx.const(self.zero, "uint8"), CHANNELS)
        if not inside:
            word = tirx.Broadcast(tirx.const(int(np.full(_ROWS, self.zero, "uint8").view("<u4")[0]), "uint32"), _LANES)
            return [[word] * _VECTORS] * self.words
        stride = self.kernel.size(self.x.strides[2])
        codes = []
        for place, exists in self.rows:
            read = self.data[tirx.Ramp(place + column * stride, int64(1), CHANNELS)]
            codes.append(read if self.all_inside else tirx.Select(exists, read, outside))
        return [self.interleaved(codes[first : first + _ROWS]) for first in range(0, len(codes), _ROWS)]

    def interleaved(self, rows: list[Any]) -> list[Any]:
        """Vectors of words from up to four rows; what stands for a row that does not exist has weights that are 0."""
        lines = [self.kept(turned(row)) for row in rows]
        lines += [lines[-1]] * (_ROWS - len(lines))
        halves = [[self.kept(joined(a, b, 1, upper)) for a, b in (lines[:2], lines[2:])] for upper in (0, 1)]
        return [
            self.kept(tirx.reinterpret(f"uint32x{_LANES}", joined(a, b, 2, upper)))
            for a, b in halves
            for upper in (0, 1)
        ]

    def kept(self, value: Any) -> Any:
        """The vector in a register of its own."""
        kind = tvm.DataType(str(value.ty.dtype))
        buffer = self.kernel.registers(kind.lanes, dtype=str(kind).split("x")[0])
        whole = tirx.Ramp(int64(0), int64(1), kind.lanes)
        T.buffer_store(buffer, value, [whole])
        return buffer[whole]

    def weight_place(self, tap: int, number: int, vector: int) -> Any:
        block = self.window.taps[1] * self.words * CHANNELS
        return self.block * block + (tap * self.words + number) * CHANNELS + vector * _LANES

    def finish_pixel(self, sums: Any, pixel: int, at: Any) -> None:
        """The epilogue of one pixel, and the store."""

        def element(vector: int, lane: Any) -> Any:
            return self.element(sums[pixel, vector, lane], at, self.channel + vector * _LANES + lane)

        if store_codes(self.kernel, self.output, self.position(at, self.channel), _VECTORS, element):
            return
        for vector in range(_VECTORS):
            with self.kernel.vectorized(_LANES) as lane:
                self.store(sums[pixel, vector, lane], at, self.channel + vector * _LANES + lane)
