"""Windows over feature maps stored channels last: the loops that depthwise convolution and pooling share.

A tile is up to 16 neighbouring output pixels of one row times one vector of channels (AVX2: 8), held in registers. Each
row of taps is one step of a loop that runs only over rows inside the input, so nothing is padded or copied. Where sizes
are fixed, tiles that meet the left or right border alike share code from which taps outside the input are left out:
borders cost nothing. Elsewhere tiles inside the input take the same code and pixels at the border run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import UNUSUAL
from graphopt.backends.kernel import Kernel, Output, int64
from graphopt.backends.rules.active_blocks import Gates
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, Product, View

_MOST_RUNS = 6  # kinds of tiles in one row that get code of their own
_MANY_PIXELS = 56  # stands for a number of them known at run time
_TILE = 6  # what beginning and ending a tile costs, in multiply-adds of a vector
_ROWS_SHARED_FROM = 8  # rows a thread from which unequal shares of rows cost less than sharing out channels


@dataclass(frozen=True)
class Window:
    """For each spatial axis: taps, outputs' distance, zeros before the input, and the distance between taps."""

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def covers(self, pixel: int, tap: int) -> int:
        """Columns from the first one of a tile to what one tap of one of its pixels reads."""
        return pixel * self.strides[-1] + tap * self.dilations[-1]


@dataclass(frozen=True)
class Step:
    """One row of taps of a tile, to be combined with `accumulators` [pixels, width].

    `taps` are (pixel, tap) pairs inside the input, from left to right; `first` is the linear position of tap 0 among
    all taps and `load(pixel, tap, lane)` what a tap reads.
    """

    accumulators: Any
    taps: Sequence[tuple[int, int]]
    first: Any
    channel: Any
    width: int
    load: Callable[[int, int, Any], Any]


@dataclass(frozen=True)
class _Run:
    """Consecutive tiles, `pixels` apart, that meet the borders alike."""

    start: int
    tiles: int
    taps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Configuration:
    """What may be chosen: pixels of a tile, and shares of the channels between threads; results do not depend on it."""

    pixels: int
    channel_shares: int


def configure(shape: Shape, window: Window, target: Target) -> Configuration:
    """The default for a result of this shape."""
    lead = len(shape) - len(window.taps) - 1
    return Configuration(tile_pixels(shape[-2], target), channel_shares(shape, lead, target))


def worth_timing(shape: Shape, window: Window, target: Target) -> list[Configuration]:
    """Tiles of all sizes that fit the registers, channels shared out or not, the least expected time first."""
    usual = configure(shape, window, target)
    outputs, width = shape[-2], vector_width(shape[-1], target)
    most = target.registers - 6 if not isinstance(outputs, int) else min(outputs, target.registers - 6)
    vectors = -(-shape[-1] // width) if isinstance(shape[-1], int) else 1
    costs: dict[Configuration, float] = {}
    for pixels in range(1, most + 1):
        loads = window.covers(pixels - 1, window.taps[-1] - 1) + 1 + window.taps[-1]
        tiles = -(-outputs // pixels) if isinstance(outputs, int) else _MANY_PIXELS / pixels
        time = tiles * (max(pixels * window.taps[-1], loads) + _TILE)
        for shares in sorted({1, min(target.threads, vectors), min(2 * target.threads, vectors)}):
            doubt = 1 if shares == usual.channel_shares else UNUSUAL
            costs[Configuration(pixels, shares)] = time * doubt
    return sorted(costs, key=lambda choice: costs[choice])


def tile_pixels(outputs: Size, target: Target) -> int:
    """Pixels of one tile: as many as registers allow, and such that few are computed twice at the end of a row."""
    most = 16 if target.lanes == 16 else 8
    if not isinstance(outputs, int):
        return most // 2
    if outputs <= most:
        return max(1, outputs)
    return min(range(most, most // 2, -1), key=lambda pixels: (-(-outputs // pixels) * pixels, -pixels))


def vector_width(channels: Size, target: Target) -> int:
    """Lanes of one vector of channels; the last vector of a pixel starts early where they do not divide."""
    width: int = target.lanes if isinstance(channels, int) else 1
    while isinstance(channels, int) and width > channels:
        width //= 2
    return width


class Windows:
    """A kernel over all windows of `x` [N, spatial axes, C] or [spatial axes, C], which has channel stride 1.

    `start` is what accumulators begin with, `combine` adds a step to them. `end` is the element-wise tree over the bare
    `result`, which has the axes of `x`. float16 and bfloat16 are combined in float32, and codes, less `origin`, in the
    result's type, float32 or int32. With `gates`, the bias of which is added, vectors of channels that take no
    part are left out: the bare result is zero there.
    """

    def __init__(
        self,
        kernel: Kernel,
        x: View,
        window: Window,
        result: Product,
        end: Any,
        output: Output,
        gates: Gates | None = None,
        choice: Configuration | None = None,
        origin: int = 0,
    ) -> None:
        self.gates, self.origin = gates, origin
        self.choice = choice or configure(result.shape, window, kernel.target)
        self.kernel, self.window, self.result, self.end, self.output = kernel, window, result, end, output
        self.x, self.data = x, kernel.flat(x.storage)
        self.lead = len(result.shape) - len(window.taps) - 1  # axes before the spatial ones
        self.compute = "float32" if x.dtype in ("float16", "bfloat16") else result.dtype
        self.channels = kernel.size(result.shape[-1])
        self.width = vector_width(result.shape[-1], kernel.target)
        self.outputs = result.shape[-2]
        self.pixels = self.choice.pixels

    def write(self, start: float, combine: Callable[[Step], None]) -> None:
        kernel = self.kernel
        self.start, self.combine = start, combine
        vectors = tirx.truncdiv(self.channels + (self.width - 1), int64(self.width))
        shares = self.choice.channel_shares
        each = tirx.truncdiv(vectors + (shares - 1), int64(shares))
        rows = kernel.size(product(self.result.shape[:-2]))
        with kernel.parallel(shares * rows) as task:
            self.row = tirx.truncmod(task, rows) if shares > 1 else task
            self.place = axes_at(kernel, self.row, self.result.shape[:-2])
            first = tirx.truncdiv(task, rows) * each if shares > 1 else int64(0)
            with kernel.serial(tirx.min(each, vectors - first)) as vector:
                self.channel = tirx.min((first + vector) * self.width, self.channels - self.width)
                self.write_row_if_active()

    def write_row_if_active(self) -> None:
        kernel, mask = self.kernel, self.gates.outputs if self.gates else None
        if self.gates is None or mask is None:
            self.write_row()
            return
        block = self.place[0] * kernel.size(mask.shape[1]) + tirx.truncdiv(self.channel, int64(self.gates.block))
        with T.If(kernel.flat(mask.storage)[block]):
            with T.Then():
                self.write_row()
            with T.Else():
                self.write_zeros()

    def write_zeros(self) -> None:
        """A row of what takes no part."""
        with self.kernel.serial(self.kernel.size(self.outputs)) as pixel, self.kernel.vectorized(self.width) as lane:
            self.store(tirx.const(0, self.compute), pixel, self.channel + lane)

    def write_row(self) -> None:
        runs = self.runs()
        if not runs:
            self.write_symbolic_row()
        for run in runs:
            if run.tiles == 1:
                self.write_tile(int64(run.start), run.taps)
                continue
            with self.kernel.serial(run.tiles) as tile:
                self.write_tile(tile * self.pixels + run.start, run.taps)

    def runs(self) -> list[_Run]:
        """The tiles of a row; none where sizes are symbolic or the borders cut too many of them in their own way."""
        runs = self.every_run() if isinstance(self.x.shape[-2], int) and isinstance(self.outputs, int) else []
        return runs if len(runs) <= _MOST_RUNS else []

    def every_run(self) -> list[_Run]:
        """The tiles of a row of a known size."""
        columns, outputs, pixels = self.x.shape[-2], self.outputs, self.pixels
        runs: list[_Run] = []
        for tile in range(-(-outputs // pixels)):
            start = min(tile * pixels, outputs - pixels)
            corner = start * self.window.strides[-1] - self.window.pads[-1]
            inside = tuple(pair for pair in self.taps() if 0 <= corner + self.window.covers(*pair) < columns)
            last = runs[-1] if runs else None
            if last and last.taps == inside and start == last.start + last.tiles * pixels:
                runs[-1] = _Run(last.start, last.tiles + 1, inside)
            else:
                runs.append(_Run(start, 1, inside))
        return runs

    def taps(self) -> list[tuple[int, int]]:
        """All (pixel, tap) pairs of a tile, those that read the same element next to each other."""
        pairs = [(pixel, tap) for pixel in range(self.pixels) for tap in range(self.window.taps[-1])]
        return sorted(pairs, key=lambda pair: (self.window.covers(*pair), pair))

    def write_symbolic_row(self) -> None:
        kernel, window, pixels = self.kernel, self.window, self.pixels
        outputs, columns = kernel.size(self.outputs), kernel.size(self.x.shape[-2])
        with kernel.serial(tirx.truncdiv(outputs + (pixels - 1), int64(pixels))) as tile:
            first = tile * pixels
            corner = first * window.strides[-1] - window.pads[-1]
            reach = corner + window.covers(pixels - 1, window.taps[-1] - 1)
            with T.If(tirx.all(corner >= 0, reach < columns, first + pixels <= outputs)):
                with T.Then():
                    self.write_tile(first, self.taps())
                with T.Else(), kernel.serial(tirx.min(int64(pixels), outputs - first)) as pixel:
                    self.write_pixel(first + pixel)

    def write_tile(self, first: Any, taps: Sequence[tuple[int, int]]) -> None:
        """Pixels from `first` on; every tap in `taps` is inside the input."""
        accumulators = self.begin(self.pixels)
        corner = first * self.window.strides[-1] - self.window.pads[-1]
        if taps:
            with ExitStack() as loops:
                outer, position = self.outer_taps(loops)
                self.step(accumulators, taps, outer * self.window.taps[-1], position, corner)
        self.finish(accumulators, first, self.pixels)

    def write_pixel(self, pixel: Any) -> None:
        """One pixel wherever it lies."""
        window = self.window
        accumulators = self.begin(1)
        corner, low, high = self.span(len(window.taps) - 1, pixel)
        with ExitStack() as loops:
            outer, position = self.outer_taps(loops)
            tap = low + loops.enter_context(self.kernel.serial(high - low))
            column = corner + tap * window.dilations[-1]
            self.step(accumulators, [(0, 0)], outer * window.taps[-1] + tap, position, column)
        self.finish(accumulators, pixel, 1)

    def begin(self, pixels: int) -> Any:
        accumulators = self.kernel.registers(pixels, self.width, dtype=self.compute)
        for pixel in range(pixels):
            with self.kernel.vectorized(self.width) as lane:
                T.buffer_store(accumulators, tirx.const(self.start, self.compute), [pixel, lane])
        return accumulators

    def step(self, accumulators: Any, taps: Sequence[tuple[int, int]], first: Any, position: Any, corner: Any) -> None:
        stride = self.kernel.size(self.x.strides[-2])
        origin = position + corner * stride + self.channel

        def load(pixel: int, tap: int, lane: Any) -> Any:
            value = self.data[origin + self.window.covers(pixel, tap) * stride + lane]
            value = value if self.compute == self.x.dtype else value.astype(self.compute)
            return value - tirx.const(self.origin, self.compute) if self.origin else value

        self.combine(Step(accumulators, taps, first, self.channel, self.width, load))

    def outer_taps(self, loops: ExitStack) -> tuple[Any, Any]:
        """Open a loop for each spatial axis but the last: the taps' linear number and where their row begins in `x`."""
        kernel, window = self.kernel, self.window
        position, number = kernel.size(self.x.offset), int64(0)
        for at, stride in zip(self.place[: self.lead], self.x.strides, strict=False):
            position = position + at * kernel.size(stride)
        for axis in range(len(window.taps) - 1):
            corner, low, high = self.span(axis, self.place[self.lead + axis])
            tap = low + loops.enter_context(kernel.serial(high - low))
            number = number * window.taps[axis] + tap
            stride = kernel.size(self.x.strides[self.lead + axis])
            position = position + (corner + tap * window.dilations[axis]) * stride
        return number, position

    def span(self, axis: int, at: Any) -> tuple[Any, Any, Any]:
        """Where along a spatial axis the window of output `at` begins, its first tap inside the input, and the end."""
        window, size = self.window, self.kernel.size(self.x.shape[self.lead + axis])
        corner = at * window.strides[axis] - window.pads[axis]
        taps, apart = window.taps[axis], int64(window.dilations[axis])
        low = tirx.truncdiv(tirx.max(-corner, int64(0)) + (apart - 1), apart)
        high = tirx.truncdiv(tirx.max(size - corner, int64(0)) + (apart - 1), apart)
        high = tirx.min(high, int64(taps))
        return corner, low, tirx.max(low, high)

    def finish(self, accumulators: Any, first: Any, pixels: int) -> None:
        """The epilogue of each pixel, and the store."""
        for pixel in range(pixels):
            with self.kernel.vectorized(self.width) as lane:
                value = accumulators[pixel, lane]
                if self.gates is not None and self.gates.bias is not None:
                    value = value + self.kernel.flat(self.gates.bias.storage)[self.channel + lane]
                self.store(value, first + pixel, self.channel + lane)

    def store(self, value: Any, pixel: Any, channel: Any) -> None:
        self.output.store(self.position(pixel, channel), self.element(value, pixel, channel))

    def position(self, pixel: Any, channel: Any) -> Any:
        return (self.row * self.kernel.size(self.outputs) + pixel) * self.channels + channel

    def element(self, value: Any, pixel: Any, channel: Any) -> Any:
        """What the combined `value` becomes."""
        kernel, result = self.kernel, self.result
        row = self.row * kernel.size(self.outputs) + pixel
        kernel.define(result, lambda _: value if self.compute == result.dtype else value.astype(result.dtype))
        index = Index(result.shape, kernel.sizes, axes=(*self.place, pixel, channel), row=row, column=channel)
        return kernel.load(self.end, index.reshaped(self.end.shape))


def axes_at(kernel: Kernel, row: Any, shape: Sequence[Size]) -> tuple[Any, ...]:
    """The position of a row along the axes before it."""
    return tuple(kernel.index(tuple(shape), linear=row).axis(number) for number in range(len(shape)))


def channel_shares(shape: Shape, lead: int, target: Target) -> int:
    """Parts into which channels are shared out between threads: 1 where the rows of an image can be.

    `shape` is the result's, `lead` of its axes come before the spatial ones.
    """
    rows = product(shape[lead:-2])
    if not isinstance(rows, int) or rows % target.threads == 0 or rows >= _ROWS_SHARED_FROM * target.threads:
        return 1
    channels = shape[-1]
    return min(target.threads, -(-channels // vector_width(channels, target))) if isinstance(channels, int) else 1
