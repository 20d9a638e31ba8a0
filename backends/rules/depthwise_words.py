"""Depthwise convolution of codes with VNNI: a word is one channel under up to four rows of taps.

Three or four rows of 64 channels become four vectors of words, in the order of the channels, with a permutation each
and eight interleavings. A column of words serves every pixel that has it under one of its columns of taps, with one
multiplication for each vector. A pixel of 3 x 3 taps costs 3 multiplications and 3 shuffles a vector of 16 channels,
where float32 takes 9 multiply-adds and 12 conversions.

What lies outside of x has the code that stands for 0. Channels are taken 64 at a time. The last 32 or 16 share a vector
with those of one or three other pixels, which lie in the next parts of the row; some are computed twice where they are
no whole block. Weights lie as the words they multiply, for each of these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.code_instructions import beside, joined, turned
from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.code_stores import store_codes
from graphopt.backends.rules.depthwise import RULE
from graphopt.backends.rules.windows import Configuration, Window, Windows, axes_at, configure, worth_timing
from graphopt.backends.sizes import Shape, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

CHANNELS = 64  # of a block
_ROWS, _LANES = 4, 16  # rows of taps in a word, words of a vector
_VECTORS = CHANNELS // _LANES
_WIDTHS = (16, 32, 64)  # channels of a block
_MOST_PIXELS = 8  # of a tile by default: each has code of its own


@dataclass(frozen=True)
class Block:
    """`width` channels from `start` on, beside those of other pixels in vectors of 64 bytes."""

    start: int
    width: int

    @property
    def together(self) -> int:
        """Pixels in a vector."""
        return CHANNELS // self.width


def blocks(channels: int, outputs: int) -> list[Block]:
    """Blocks of 64 channels, then smaller ones; rows of `outputs` pixels have to hold as many as share a vector."""
    found = [Block(start, CHANNELS) for start in range(0, channels - CHANNELS + 1, CHANNELS)]
    start = CHANNELS * len(found)
    usable = [width for width in _WIDTHS if width <= channels and CHANNELS // width <= outputs]
    while start < channels:
        rest = channels - start
        width = next((width for width in usable if width >= rest), usable[-1])
        found.append(Block(min(start, channels - width), width))
        start += width
    return found


def fits(x: Shape, outputs: Shape, target: Target) -> bool:
    """Whether there is a kernel for images [N, C, H, W] and outputs: enough channels, and rows of a known size."""
    known = all(isinstance(size, int) for size in (x[1], x[3], outputs[3]))
    wide = known and any(w <= int(x[1]) and CHANNELS // w <= int(outputs[3]) for w in _WIDTHS)
    return target.quads == "uint8" and target.lanes == _LANES and wide


def pack_depthwise_words(weight: np.ndarray, outputs: int) -> np.ndarray:
    """int8 [C, 1, KH, KW] -> [blocks, KW, ceil(KH / 4), 64, 4], with zeros under rows that do not exist.

    Those of smaller blocks repeat for each pixel of a vector.
    """
    channels, _, rows, columns = weight.shape
    padded = np.pad(weight[:, 0], ((0, 0), (0, -rows % _ROWS), (0, 0)))
    words = padded.reshape(channels, -1, _ROWS, columns).transpose(3, 1, 0, 2)
    every = blocks(channels, outputs)
    return np.stack([np.tile(words[:, :, b.start : b.start + b.width], (1, 1, b.together, 1)) for b in every])


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
        Configuration(_pixels(int(result.shape[-2]), 1), usual.channel_shares),
        lambda: [choice for choice in worth_timing(result.shape, window, target) if choice.pixels <= 2 * _MOST_PIXELS],
        lambda choice: _depthwise_words(x, weight, result, end, window, name, target, zero, choice),
    )


def _pixels(outputs: int, together: int, most: int = _MOST_PIXELS) -> int:
    """As many vectors as a tile may have, such that few pixels are computed twice at the end of a row."""
    most = min(outputs // together, most)
    return min(range(most, most // 2, -1), key=lambda n: (-(-outputs // (n * together)) * n, -n))


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
        self.zero = zero
        self.blocks = blocks(int(result.shape[-1]), int(result.shape[-2]))
        self.weights = kernel.words(weight.storage, "uint32")
        self.words = -(-window.taps[0] // _ROWS)

    def write_blocks(self) -> None:
        """Tasks are rows x shares of the blocks of 64 channels; the last share has the smaller ones too."""
        kernel, shares = self.kernel, self.choice.channel_shares
        whole = [block for block in self.blocks if block.width == CHANNELS]
        rows = kernel.size(product(self.result.shape[:-2]))
        each = -(-len(whole) // shares)
        with kernel.parallel(shares * rows) as task:
            self.row = tirx.truncmod(task, rows) if shares > 1 else task
            self.place = axes_at(kernel, self.row, self.result.shape[:-2])
            share = tirx.truncdiv(task, rows) if shares > 1 else int64(0)
            if whole:
                first = share * each
                with kernel.serial(tirx.min(int64(each), len(whole) - first)) as number:
                    last = self.channels - CHANNELS  # of a pixel's channels, where 64 do not divide them
                    self.write_block(whole[0], first + number, tirx.min((first + number) * CHANNELS, last))
            with T.If(share == shares - 1) if shares > 1 else nullcontext(), T.Then() if shares > 1 else nullcontext():
                for number, block in enumerate(self.blocks[len(whole) :]):
                    self.write_block(block, int64(len(whole) + number), int64(block.start))

    def write_block(self, block: Block, number: Any, channel: Any) -> None:
        """One row of outputs of a block, the `number`-th one, of channels from `channel` on."""
        self.block, self.number, self.channel = block, number, T.bind(channel)
        self.vectors = _pixels(int(self.outputs), block.together, self.choice.pixels)
        self.pixels = self.vectors * block.together
        self.write_row()

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
        """Columns of words from left to right; a vector's pixels are stored once its last one has been multiplied."""
        sums = self.kernel.registers(self.vectors, _VECTORS, _LANES, dtype="int32")
        whole = tirx.Ramp(int64(0), int64(1), _LANES)
        corner = first * self.window.strides[1] - self.window.pads[1]
        inside = {self.window.covers(*pair) for pair in taps}
        column, words = -1, list[list[Any]]()
        for pixel, tap in ((pixel, tap) for pixel, tap in self.taps() if pixel < self.vectors):
            at = self.window.covers(pixel, tap)
            if at != column:
                column, words = at, self.column(corner, at, inside)
            for vector in range(_VECTORS):
                total = tirx.Broadcast(tirx.const(0, "int32"), _LANES) if tap == 0 else sums[pixel, vector, whole]
                for number, word in enumerate(words):
                    weight = self.weights[tirx.Ramp(self.weight_place(tap, number, vector), int64(1), _LANES)]
                    total = multiply_quads(total, word[vector], weight, _LANES)
                T.buffer_store(sums, total, [pixel, vector, whole])
            if tap == self.window.taps[1] - 1:
                for part in range(self.block.together):
                    self.finish_pixel(sums, pixel, part, first + (part * self.vectors + pixel))

    def column(self, corner: Any, at: int, inside: set[int]) -> list[list[Any]]:
        """The words of a column of x and of those where the other pixels of a vector have theirs: for each four rows of
        taps the vectors of a block. None where all are outside and stand for 0 with the code 0."""
        width, stride = self.block.width, self.kernel.size(self.x.strides[2])
        columns = [at + part * self.vectors * self.window.strides[1] for part in range(self.block.together)]
        exist = [column in inside for column in columns]
        if not any(exist):
            word = tirx.Broadcast(tirx.const(int(np.full(_ROWS, self.zero, "uint8").view("<u4")[0]), "uint32"), _LANES)
            return [[word] * _VECTORS] * self.words if self.zero else []
        outside = tirx.Broadcast(tirx.const(self.zero, "uint8"), width)
        codes = []
        for place, exists in self.rows:
            parts = [
                self.data[tirx.Ramp(place + (corner + column) * stride, int64(1), width)] if there else outside
                for column, there in zip(columns, exist, strict=True)
            ]
            read = parts[0] if len(parts) == 1 else beside(parts)
            none = tirx.Broadcast(tirx.const(self.zero, "uint8"), CHANNELS)
            codes.append(read if self.all_inside else tirx.Select(exists, read, none))
        return [self.interleaved(codes[first : first + _ROWS]) for first in range(0, len(codes), _ROWS)]

    def interleaved(self, rows: list[Any]) -> list[Any]:
        """Vectors of words from up to four rows; what stands for a row that does not exist has weights that are 0."""
        lines = [self.kept(turned(row)) for row in rows]
        lines += [lines[-1]] * (_ROWS - len(lines))
        halves = [[self.kept(joined(a, b, 1, upper)) for a, b in (lines[:2], lines[2:])] for upper in (0, 1)]
        words = (joined(a, b, 2, upper) for a, b in halves for upper in (0, 1))
        return [self.kept(tirx.reinterpret(f"uint32x{_LANES}", word)) for word in words]

    def kept(self, value: Any) -> Any:
        """The vector in a register of its own."""
        kind = tvm.DataType(str(value.ty.dtype))
        buffer = self.kernel.registers(kind.lanes, dtype=str(kind).split("x")[0])
        whole = tirx.Ramp(int64(0), int64(1), kind.lanes)
        T.buffer_store(buffer, value, [whole])
        return buffer[whole]

    def weight_place(self, tap: int, number: int, vector: int) -> Any:
        block = self.window.taps[1] * self.words * CHANNELS
        return self.number * block + (tap * self.words + number) * CHANNELS + vector * _LANES

    def finish_pixel(self, sums: Any, vector: int, part: int, at: Any) -> None:
        """The epilogue of one pixel of a vector, and the store."""
        count = _VECTORS // self.block.together

        def total(number: int, lane: Any) -> Any:
            return sums[vector, part * count + number, lane]

        def element(number: int, lane: Any) -> Any:
            return self.element(total(number, lane), at, self.channel + number * _LANES + lane)

        if store_codes(self.kernel, self.output, self.position(at, self.channel), count, element):
            return
        for number in range(count):
            with self.kernel.vectorized(_LANES) as lane:
                self.store(total(number, lane), at, self.channel + number * _LANES + lane)
