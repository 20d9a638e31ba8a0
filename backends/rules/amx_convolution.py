"""Direct convolution of bfloat16 or 8-bit codes on AMX tiles: a matrix product whose left matrix is never built.

A task copies the rows of input that its block of output rows needs into scratch, with what is padded around them. Rows
of the copy that are a stride apart lie beside each other, and each is as long as a whole number of strides, so that
output pixels counted along rows of that length are equally far apart in it: any 16 of them are a tile, whatever row
they are in. Pixels in the border between rows are computed and not stored; that is 2 of 16 columns of a 3 x 3 window
over 14. Taps side by side are one run of the depth, which a tile's rows overlap in, so that few channels fill a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.choice import UNUSUAL
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules import amx_block
from graphopt.backends.rules.integer_gemm import in_words
from graphopt.backends.rules.pointwise import for_columns
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

RULE = "amx-convolution"
_STEP_WORDS = amx.ROW_BYTES // 4  # 32-bit words of a tile's row
_SYMBOLIC_ROWS = 4  # rows of a block where their length is known at run time
_COPY_BYTES = 256 << 10  # of the copy of a block, an eighth of a common L2 cache
_SERIAL_BELOW = 1 << 20  # multiply-adds that are not worth the launch of threads
_COPIED = 16  # bytes a cycle


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one workload; results do not depend on it."""

    block_rows: int  # rows of output pixels of a block
    row_groups: int  # shares of the blocks between threads
    panel_groups: int  # shares of the panels between threads


@dataclass(frozen=True)
class TileConvolution:
    """x [N, H, W, C] with channels beside each other in whole words of 32 bits, weight as `pack_filter_tiles` packs it
    for the same window, outputs [N, OH, OW, O]; `outside` is the bits of a word outside of x.
    """

    x: View
    weight: View
    outputs: Shape
    window: Window
    outside: int
    choice: Configuration


def fits(target: Target, x: View, groups: int) -> bool:
    """Whether x [N, H, W, C] is bfloat16 or uint8 in whole words and the target has tiles for it."""
    if not target.amx or groups != 1 or x.dtype not in amx.NUMBERS:
        return False
    numbers = amx.NUMBERS[x.dtype]
    whole = all(step % numbers.together == 0 for step in (x.shape[3], *x.strides[:3], x.offset))
    return whole and x.strides[3] == 1 and padded_channels(numbers, int(x.shape[3])) <= 2 * int(x.shape[3])


def padded_channels(numbers: amx.Numbers, channels: int) -> int:
    """Channels of a pixel in the copy. A step reads on behind a run, and NaN times zero is NaN: bfloat16 has whole
    steps of zeros there."""
    each = numbers.depth if numbers.sums == "float32" else numbers.together
    return channels + -channels % each


def runs(window: Window) -> tuple[int, int]:
    """(runs, taps of one): taps of a row are one run where they lie beside each other."""
    rows, columns = window.taps
    return (rows, columns) if window.dilations[1] == 1 else (rows * columns, 1)


def pack_filter_tiles(filters: np.ndarray, window: Window, numbers: amx.Numbers) -> np.ndarray:
    """[O, C, KH, KW] -> what `pack_tiles` makes of [O, runs x taps x channels], each run up to whole steps."""
    missing = padded_channels(numbers, filters.shape[1]) - filters.shape[1]
    inner = np.pad(filters.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, missing)))
    each = inner.reshape(filters.shape[0], runs(window)[0], -1)
    whole = np.pad(each, ((0, 0), (0, 0), (0, -each.shape[2] % numbers.depth)))
    return amx_block.pack_tiles(whole.reshape(filters.shape[0], -1))


def offered(target: Target, x: View, outputs: Shape, window: Window, groups: int) -> list[Configuration]:
    """What is worth timing, the least expected time first; nothing where tiles do not fit."""
    return _candidates(target, x, outputs, window) if fits(target, x, groups) else []


def _candidates(target: Target, x: View, outputs: Shape, window: Window) -> list[Configuration]:
    """Every way to share with blocks of three sizes."""
    costs: dict[Configuration, float] = {}
    for scale, doubt in ((1.0, 1.0), (0.5, UNUSUAL), (2.0, UNUSUAL)):
        for row_groups, panel_groups in _shares(target.threads, x, outputs, window):
            rows = _block_rows(x, outputs, window, row_groups, scale)
            choice = Configuration(rows, row_groups, panel_groups)
            costs.setdefault(choice, doubt * _cost(x, outputs, window, choice))
    return sorted(costs, key=lambda choice: costs[choice])


def _shares(threads: int, x: View, outputs: Shape, window: Window) -> list[tuple[int, int]]:
    work = product(outputs) * int(x.shape[3]) * window.taps[0] * window.taps[1]
    if isinstance(work, int) and work < _SERIAL_BELOW:
        return [(1, 1)]
    return [(threads // panels, panels) for panels in range(1, threads + 1) if threads % panels == 0]


def _block_rows(x: View, outputs: Shape, window: Window, row_groups: int, scale: float) -> int:
    """Rows whose copy is not too large, in blocks of one size, as many for each share."""
    batch, height, width, _ = outputs
    if not isinstance(height, int) or not isinstance(width, int):
        return max(1, int(_SYMBOLIC_ROWS * scale))
    numbers = amx.NUMBERS[x.dtype]
    row = width * window.strides[0] * window.strides[1] * int(x.shape[3]) * numbers.bytes
    blocks = -(-height * row // int(_COPY_BYTES * scale))
    if isinstance(batch, int) and batch < row_groups:
        each = -(-row_groups // batch)
        blocks = -(-blocks // each) * each
    return max(1, -(-height // blocks))


def _cost(x: View, outputs: Shape, window: Window, choice: Configuration) -> float:
    """Cycles of the longest share."""
    batch, height, width, channels = (size if isinstance(size, int) else 32 for size in outputs)
    numbers = amx.NUMBERS[x.dtype]
    of_pixel = padded_channels(numbers, int(x.shape[3])) * numbers.bytes
    number, taps = runs(window)
    steps = number * -(-taps * of_pixel // amx.ROW_BYTES)
    geometry = Geometry.of((batch, height, width, channels), window, choice.block_rows, of_pixel // 4)
    every = -(-channels // amx_block.PANEL)
    panels = -(-every // choice.panel_groups)
    blocks = -(-batch * -(-height // choice.block_rows) // choice.row_groups)
    sums = -(-int(geometry.pixels) // amx_block.ROWS)
    return amx_block.cycles(blocks * sums, panels, steps) + blocks * int(geometry.words) * 4 / _COPIED


@dataclass(frozen=True)
class Geometry:
    """The copy of a block: `planes` of input rows that are a stride apart, `rows` each of `wide` pixels."""

    unit: int  # words of a pixel
    planes: int
    rows: int
    pitch: Size  # output pixels that a row is as long as
    wide: Size  # pixels of a row
    pixels: Size  # of output in a whole block, with the borders between its rows

    @staticmethod
    def of(outputs: Shape, window: Window, block_rows: int, unit: int) -> Geometry:
        (down, across), width = window.strides, outputs[2]
        reach = [(taps - 1) * apart + 1 for taps, apart in zip(window.taps, window.dilations, strict=True)]
        pitch = width + (reach[1] - 1) // across
        rows = block_rows + (reach[0] - 1) // down
        return Geometry(unit, min(down, reach[0]), rows, pitch, pitch * across, (block_rows - 1) * pitch + width)

    @property
    def words(self) -> Size:
        return self.planes * self.rows * self.wide * self.unit

    def place(self, row: Any, wide: Any, down: int) -> Any:
        """Where the input row `row` of the block begins."""
        if down == 1:
            return row * (wide * self.unit)
        plane, at = tirx.truncmod(row, int64(down)), tirx.truncdiv(row, int64(down))
        return (plane * self.rows + at) * (wide * self.unit)


def tile_convolution(call: TileConvolution, result: Product, end: Any, name: str, target: Target) -> Code:
    """out[n, h, w, o] = sum over taps and channels of x[n, h sh + kh dh - ph, w sw + kw dw - pw, c] weight.

    bfloat16 with float32 sums or, exactly, uint8 by int8 with int32 sums; then the element-wise tree `end` over
    `result`, which has the pixels of `outputs` as rows and its channels.
    """
    choice = call.choice
    depth = int(call.x.shape[3]) * call.window.taps[0] * call.window.taps[1]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Convolution(kernel, call, result, end, outputs[0]).write()

    code = write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [call.x, call.weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "products": f"tiles of {amx.NUMBERS[call.x.dtype].name}",
            "block_rows": choice.block_rows,
            "row_groups": choice.row_groups,
            "panel_groups": choice.panel_groups,
        },
        flops=2 * depth * product(call.outputs) + operations([end], target),
        extra_shapes=[call.outputs],
    )
    return replace(code, function=code.function.with_attr(amx.USES_TILES, True))


def without_strides(x: View, window: Window) -> tuple[View, Window]:
    """The same with x as far apart as the outputs along axes of one tap and no padding before it."""
    shape, strides, steps = list(x.shape), list(x.strides), list(window.strides)
    for axis in range(2):
        if window.taps[axis] == 1 and window.pads[axis] == 0:
            shape[1 + axis] = (shape[1 + axis] + steps[axis] - 1) // steps[axis]
            strides[1 + axis] = strides[1 + axis] * steps[axis]
            steps[axis] = 1
    return View(x.storage, tuple(shape), tuple(strides), x.offset), replace(window, strides=tuple(steps))


class _PixelSums(amx_block.StoredSums):
    """Sums whose rows are pixels, some of them in the border between rows of the result."""

    def __init__(self, kernel: Kernel, height: int, numbers: amx.Numbers, pitch: Any, width: Any) -> None:
        super().__init__(kernel, height, numbers)
        self.pitch, self.width = pitch, width
        self.first: Any = 0  # pixel of the first row
        self.before: Any = 0  # position of the block's first pixel in the result
        self.place: Any = 0  # of the row that is being written

    def each_row(self, rows: Any, write: Callable[[Any], None]) -> None:
        with self.kernel.serial(rows) as row:
            pixel = T.bind(self.first + row)
            column = T.bind(tirx.truncmod(pixel, self.pitch))
            with T.If(column < self.width), T.Then():
                self.place = T.bind(self.before + tirx.truncdiv(pixel, self.pitch) * self.width + column)
                write(T.bind(self.begin + row))


class _Convolution:
    def __init__(self, kernel: Kernel, call: TileConvolution, result: Product, end: Any, output: Output) -> None:
        self.kernel, self.choice, self.outside = kernel, call.choice, call.outside
        self.result, self.end, self.output = result, end, output
        self.numbers = numbers = amx.NUMBERS[call.x.dtype]
        x, self.window = without_strides(call.x, call.window)
        self.x = in_words(x, numbers.together)
        self.words = kernel.words(x.storage, "uint32")
        self.weight = kernel.words(call.weight.storage, numbers.bits)
        self.panels, self.steps = (int(size) for size in call.weight.shape[:2])
        self.batch, self.height, self.width, _ = (kernel.size(size) for size in call.outputs)
        self.outputs = int(call.outputs[3])
        unit = padded_channels(numbers, int(x.shape[3])) // numbers.together
        self.geometry = geometry = Geometry.of(call.outputs, self.window, self.choice.block_rows, unit)
        self.wide, self.pitch = kernel.size(geometry.wide), kernel.size(geometry.pitch)
        self.tall = 1 if isinstance(geometry.pixels, int) and geometry.pixels <= amx.ROWS else 2
        self.apart = self.window.strides[1] * unit  # words between two pixels

    def write(self) -> None:
        kernel, choice = self.kernel, self.choice
        amx.require()
        per_image = tirx.floordiv(self.height + (choice.block_rows - 1), int64(choice.block_rows))
        blocks = self.batch * per_image
        tasks = choice.row_groups * choice.panel_groups
        with (kernel.serial if tasks == 1 else kernel.parallel)(tasks) as task:
            share = tirx.truncdiv(task, int64(choice.panel_groups))
            first = T.bind(tirx.truncdiv(share * blocks, int64(choice.row_groups)))
            own = tirx.truncdiv((share + 1) * blocks, int64(choice.row_groups)) - first
            copy = kernel.scratch(kernel.size(self.geometry.words + self.slack()), dtype="uint32")
            sums = _PixelSums(kernel, self.tall, self.numbers, int64(self.pitch), int64(self.width))
            amx_block.configure(kernel, self.tall, amx.ROWS)
            with kernel.serial(own) as number:
                block = first + number
                image = T.bind(tirx.truncdiv(block, per_image))
                first_row = T.bind(tirx.truncmod(block, per_image) * choice.block_rows)
                self.copy_rows(copy, image, first_row)
                self.write_panels(copy, sums, image, first_row, tirx.truncmod(task, int64(choice.panel_groups)))
            amx.release()

    def slack(self) -> int:
        """Words behind the copy that tiles read for pixels which do not exist, and steps behind a run."""
        return amx_block.ROWS * self.apart + _STEP_WORDS

    # Input ------------------------------------------------------------------------------------------------------------
    def copy_rows(self, copy: Any, image: Any, first_row: Any) -> None:
        kernel, x, geometry = self.kernel, self.x, self.geometry
        (down, _), (above, left) = self.window.strides, self.window.pads
        strides = [kernel.size(stride) for stride in x.strides]
        height, width = kernel.size(x.shape[1]), kernel.size(x.shape[2])
        inside = T.bind(tirx.min(int64(width), self.wide - left))
        channels, unit = int(x.shape[3]), geometry.unit
        together = x.strides[2] == channels == unit
        with kernel.serial(geometry.planes) as plane, kernel.serial(geometry.rows) as row:
            at = T.bind((first_row + row) * down + plane - above)
            place = T.bind((plane * geometry.rows + row) * (self.wide * unit))
            start = T.bind(kernel.size(x.offset) + image * strides[0] + at * strides[1])
            with T.If(tirx.all(at >= 0, at < height)):
                with T.Then():
                    self.fill(copy, place, int64(left * unit))
                    if together:
                        self.copy(copy, place + left * unit, start, inside * unit)
                    else:
                        with kernel.serial(inside) as column:
                            to = place + (left + column) * unit
                            self.copy(copy, to, start + column * strides[2], int64(channels))
                            self.fill(copy, to + channels, int64(unit - channels), 0)
                    self.fill(copy, place + (left + inside) * unit, (self.wide - left - inside) * unit)
                with T.Else():
                    self.fill(copy, place, self.wide * unit)

    def fill(self, copy: Any, place: Any, count: Any, word: int | None = None) -> None:
        bits = tirx.const(self.outside if word is None else word, "uint32")
        for_columns(self.kernel, count, lambda at: T.buffer_store(copy, bits, [place + at]))

    def copy(self, copy: Any, place: Any, start: Any, count: Any) -> None:
        for_columns(self.kernel, count, lambda at: T.buffer_store(copy, self.words[start + at], [place + at]))

    # Products ---------------------------------------------------------------------------------------------------------
    def write_panels(self, copy: Any, sums: _PixelSums, image: Any, first_row: Any, share: Any) -> None:
        kernel, groups = self.kernel, self.choice.panel_groups
        first = T.bind(tirx.truncdiv(share * self.panels, int64(groups)))
        own = T.bind(tirx.truncdiv((share + 1) * self.panels, int64(groups)) - first)
        rows = tirx.min(int64(self.choice.block_rows), self.height - first_row)
        pixels = T.bind((rows - 1) * self.pitch + self.width)
        tall = self.tall * amx.ROWS
        count = T.bind(tirx.truncdiv(pixels + (tall - 1), int64(tall)))
        sums.before = T.bind((image * self.height + first_row) * self.width)

        def multiply(block: Any, row: Any) -> None:
            number = T.bind(tirx.truncmod(block, count))
            amx_block.zero(self.tall)
            self.multiply(copy, T.bind(number * tall), T.bind(first + tirx.truncdiv(block, count)), number, count)
            sums.store([row + tile * amx.ROWS for tile in range(self.tall)])

        def finish(block: Any, row: Any) -> None:
            sums.begin, sums.first = row, T.bind(tirx.truncmod(block, count) * tall)
            sums.write(
                self.result,
                self.end,
                self.output,
                rows=tirx.min(int64(tall), pixels - sums.first),
                position=lambda _: sums.place,
                first=T.bind((first + tirx.truncdiv(block, count)) * amx_block.PANEL),
                width=self.outputs,
            )

        amx_block.overlapped(kernel, self.tall, own * count, multiply, finish)

    def multiply(self, copy: Any, first: Any, panel: Any, number: Any, count: Any) -> None:
        """All steps of a block of pixels; each prefetches its share of the next panel."""
        kernel, geometry, window = self.kernel, self.geometry, self.window
        step_numbers = amx_block.STEP // self.numbers.bytes
        weights = T.bind(panel * (self.steps * step_numbers))
        following = weights + self.steps * step_numbers
        lines = tirx.truncdiv(amx_block.LINES + count - 1, count)
        if isinstance(geometry.pixels, int):
            lines = int64(-(-amx_block.LINES // -(-geometry.pixels // (self.tall * amx.ROWS))))
        across = runs(window)[0] // window.taps[0]
        steps = self.steps // (window.taps[0] * across)
        start = T.bind(first * self.apart)
        with kernel.serial(window.taps[0]) as row, kernel.serial(across) as tap:
            down = geometry.place(row * window.dilations[0], self.wide, window.strides[0])
            run = T.bind(start + down + tap * (window.dilations[1] * geometry.unit))
            before = T.bind((row * across + tap) * steps)
            with kernel.serial(steps) as step:
                done = before + step
                amx_block.prefetch(
                    kernel, self.numbers, self.weight, following, (number * self.steps + done) * lines, lines
                )
                left = [
                    tirx.address_of(copy[run + step * _STEP_WORDS + tile * (amx.ROWS * self.apart)])
                    for tile in range(self.tall)
                ]
                amx_block.multiply(
                    self.numbers, left, int64(4 * self.apart), self.weight, weights + done * step_numbers
                )
