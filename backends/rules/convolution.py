"""Direct convolution of float32 feature maps as a matrix product whose left matrix is never built.

Output pixels are the rows of the product, output channels its columns, taps x input channels its depth. A register tile
of pixels x channels runs over all taps; each pixel has its own start in the input, so a step costs one broadcast a row
and one weight vector a column vector, as in the packed GEMM. Where the input is padded a task copies the rows its block
of pixels needs, with their zeros, into scratch: of some hundred multiply-adds an element the copy costs one. Blocks are
about 200 pixels, so that a panel of weights, read from the L2 cache, serves many tiles. Panels deeper than the L2
cache's share are taken a row of taps at a time, with partial sums in scratch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.choice import UNUSUAL
from graphopt.backends.instructions import as_pair
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.pointwise import for_columns
from graphopt.backends.rules.register_tile import PairTile, RegisterTile, Tile, choose_tile, tile_cost, tiles
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

RULE = "direct-convolution"
FEW_CHANNELS = 4  # up to which planes are read as they are: a camera's image needs no copy
_BLOCK_PIXELS = 200  # output pixels that all panels pass over before the next ones
_SYMBOLIC_ROWS = 4  # rows of a block where their length is known at run time
_LINE_WORDS = 16  # float32 weights, or pairs, of a cache line
_PANEL_BYTES = 512 << 10  # half of a common L2 cache: a deeper panel is taken a row of taps at a time


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one workload."""

    tile: Tile
    block_rows: int  # rows of output pixels of a block
    row_groups: int  # shares of the blocks between threads
    panel_groups: int  # shares of the panels between threads
    chunked: bool  # a row of taps at a time


def _reach(window: Window, axis: int) -> int:
    """Elements from the first tap to the last."""
    return (window.taps[axis] - 1) * window.dilations[axis] + 1


def channels_inner(x: View) -> bool:
    """Whether taps run outside channels: x [N, H, W, C] has channels beside each other, more than a few for pairs."""
    if x.dtype == BFLOAT16 and int(x.shape[3]) <= FEW_CHANNELS:
        return False
    return bool(x.strides[3] == 1) or x.shape[3] == 1


def pack_filters(filters: np.ndarray, groups: int, columns: int, inner: bool) -> np.ndarray:
    """[O, C / groups, KH, KW] -> [groups ceil(O / groups / columns), depth, columns], zero where a group's outputs end.

    The depth runs over (KH, KW, C) where channels are inner, else over (C, KH, KW).
    """
    outputs = filters.shape[0] // groups
    ordered = filters.transpose(0, 2, 3, 1) if inner else filters
    each = ordered.reshape(groups, outputs, -1)
    panels = -(-outputs // columns)
    packed = np.zeros((groups, panels * columns, each.shape[2]), filters.dtype)
    packed[:, :outputs] = each
    return packed.reshape(groups * panels, columns, -1).transpose(0, 2, 1)


def pack_filter_pairs(filters: np.ndarray, groups: int, columns: int) -> np.ndarray:
    """[O, C, KH, KW] of bfloat16 -> [panels, KH KW C / 2, columns, 2] as `pack_filters` orders them; C is even."""
    pairs = np.ascontiguousarray(filters.transpose(0, 2, 3, 1)).view(np.uint32).transpose(0, 3, 1, 2)
    packed = np.ascontiguousarray(pack_filters(pairs, groups, columns, True))
    return packed.view(filters.dtype).reshape(*packed.shape, 2)


def pack_planar_pairs(filters: np.ndarray, groups: int, columns: int) -> np.ndarray:
    """[O, C, KH, KW] of bfloat16 -> [panels, C KH ceil(KW / 2), columns, 2], with a zero behind an odd KW."""
    even = np.pad(filters, ((0, 0), (0, 0), (0, 0), (0, filters.shape[3] % 2)))
    pairs = np.ascontiguousarray(even).view(np.uint32)
    packed = np.ascontiguousarray(pack_filters(pairs, groups, columns, False))
    return packed.view(filters.dtype).reshape(*packed.shape, 2)


def configure(
    shape: Shape, filters: Shape, groups: int, window: Window, target: Target, temporaries: int = 0
) -> Configuration:
    """The default for outputs [N, OH, OW, O] and filters [O, C / groups, KH, KW]."""
    _, height, width, outputs = shape
    depth = int(product(filters[1:]))
    if not isinstance(height, int) or not isinstance(width, int):
        tile = choose_tile(target, _BLOCK_PIXELS, int(outputs) // groups, apart=True, temporaries=temporaries)
        return Configuration(tile, _SYMBOLIC_ROWS, target.threads, 1, False)
    best: tuple[float, Configuration] | None = None
    for row_groups, panel_groups in _shares(target.threads):
        rows = _block_rows(height, width, row_groups, 1)
        tile = choose_tile(target, rows * width, int(outputs) // groups, apart=True, temporaries=temporaries)
        columns = tile.vectors * target.lanes
        blocks, tiles = -(-height // rows), -(-rows * width // tile.rows)
        panels = groups * -(-(int(outputs) // groups) // columns)
        own_blocks, own_panels = -(-blocks // row_groups), -(-panels // panel_groups)
        work = own_blocks * tiles * own_panels * tile.rows * columns
        chunked = depth * columns * 4 > _PANEL_BYTES and window.taps[0] > 1 and blocks * tiles > 1
        if best is None or work < best[0]:
            best = work, Configuration(tile, rows, row_groups, panel_groups, chunked)
    assert best
    return best[1]


def worth_timing(
    shape: Shape, filters: Shape, groups: int, window: Window, target: Target, inner: bool, temporaries: int = 0
) -> list[Configuration]:
    """Every tile with blocks of three sizes and every way to share, the least expected time first.

    Where channels are inner, taps run outside of them, so that taking a row of them at a time changes no sum.
    """
    _, height, width, outputs = shape
    depth, each = int(product(filters[1:])), int(outputs) // groups
    costs: dict[Configuration, float] = {}
    for scale, (row_groups, panel_groups) in itertools.product((1, 0.5, 2), _shares(target.threads)):
        rows = _block_rows(height, width, row_groups, scale)
        for tile in tiles(target, True, temporaries):
            columns = tile.vectors * target.lanes
            own_panels = -(-groups * -(-each // columns) // panel_groups)
            own_blocks, pixels = 1, _BLOCK_PIXELS
            if isinstance(height, int) and isinstance(width, int):
                blocks = -(-height // rows)
                own_blocks, pixels = -(-blocks // row_groups), rows * width
            cost = own_blocks * own_panels * tile_cost(target, tile, pixels, columns, depth)
            deep = depth * columns * 4 > _PANEL_BYTES
            for chunked in (False, True) if window.taps[0] > 1 and inner else (False,):
                doubt = (UNUSUAL if scale != 1 else 1) * (UNUSUAL if chunked != deep else 1)
                costs.setdefault(Configuration(tile, rows, row_groups, panel_groups, chunked), doubt * cost)
    return sorted(costs, key=lambda choice: costs[choice])


def _block_rows(height: Size, width: Size, row_groups: int, scale: float) -> int:
    """Rows of output of a block, in whole blocks for each share."""
    if not isinstance(height, int) or not isinstance(width, int):
        return max(1, int(_SYMBOLIC_ROWS * scale))
    blocks = max(row_groups, round(height * width / (_BLOCK_PIXELS * scale)))
    return max(1, -(-height // (-(-blocks // row_groups) * row_groups)))


def _shares(threads: int) -> list[tuple[int, int]]:
    """(shares of rows, shares of panels); with as much work each, rows come first: activations stay on their core."""
    return [(threads // panels, panels) for panels in range(1, threads + 1) if threads % panels == 0]


@dataclass(frozen=True)
class Direct:
    """A convolution: x [N, H, W, C] with any strides, weight as `pack_filters` packs it, outputs [N, OH, OW, O].

    Where x is bfloat16 the weight is as `pack_filter_pairs` packs it, or, where channels are a few planes, as
    `pack_planar_pairs` does: pairs are then neighbours along W, whose stride in memory and dilation are 1.

    `padded`: taps may lie outside of x, where they read zero; so does what an odd number of taps along W lacks.
    """

    x: View
    weight: View
    outputs: Shape
    window: Window
    groups: int
    padded: bool
    choice: Configuration


def convolution(direct: Direct, result: Product, end: Any, name: str, target: Target) -> Code:
    """out[n, h, w, o] = sum over taps and channels of x[n, h sh + kh dh - ph, w sw + kw dw - pw, c] weight.

    Then the element-wise tree `end` over `result`, which has the pixels of `outputs` as rows and its channels.
    """
    choice, window = direct.choice, direct.window
    depth = int(direct.x.shape[3]) // direct.groups * window.taps[0] * window.taps[1]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        ConvolutionWriter(kernel, direct, result, end, outputs[0]).write()

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
            **({"products": "pairs of bfloat16"} if direct.x.dtype == BFLOAT16 else {}),
            "block_rows": choice.block_rows,
            "row_groups": choice.row_groups,
            "panel_groups": choice.panel_groups,
            "taps": "row by row" if choice.chunked else "all",
            "input": "padded copy" if direct.padded else "in place",
        },
        flops=2 * depth * product(direct.outputs) + operations([end], target),
        extra_shapes=[direct.outputs],
    )


@dataclass(frozen=True)
class Source:
    """Where the tap (row, column, channel) of a pixel lies: in x, or in the scratch copy of a block's rows."""

    buffer: Any
    row: Any
    column: Any
    channel: Any


@dataclass(frozen=True)
class Block:
    """Pixels [first_pixel, first_pixel + pixels) of the result and one panel of the weights."""

    first_pixel: Any
    pixels: Any
    panel: Any


class ConvolutionWriter:
    sums = "float32"

    def __init__(self, kernel: Kernel, direct: Direct, result: Product, end: Any, output: Output) -> None:
        self.kernel, self.x, self.window, self.groups = kernel, direct.x, direct.window, direct.groups
        self.result, self.end, self.output, self.choice = result, end, output, direct.choice
        self.padded, self.shape = direct.padded, direct.outputs
        self.pairs = self.x.dtype == BFLOAT16
        self.bits = kernel.words(self.x.storage, "uint16") if self.pairs else kernel.flat(self.x.storage)
        weight = direct.weight
        self.weights = kernel.words(weight.storage, "uint32") if self.pairs else kernel.flat(weight.storage)
        self.panels, self.depth, self.columns = (int(size) for size in weight.shape[:3])  # depth may count pairs
        self.lanes = kernel.target.lanes
        self.inner = channels_inner(self.x)
        self.batch, self.height, self.width, _ = (kernel.size(size) for size in self.shape)
        self.outputs = int(self.shape[3])
        self.outputs_each = self.outputs // self.groups
        self.channels = int(self.x.shape[3]) // self.groups
        self.together = 2 if self.pairs else 1  # neighbours along the inner axis that one step multiplies

    # Tasks ------------------------------------------------------------------------------------------------------------
    def write(self) -> None:
        kernel, choice = self.kernel, self.choice
        per_image = tirx.floordiv(self.height + (choice.block_rows - 1), int64(choice.block_rows))
        blocks = self.batch * per_image
        blocks_each = tirx.floordiv(blocks + (choice.row_groups - 1), int64(choice.row_groups))
        with kernel.parallel(choice.row_groups * choice.panel_groups) as task:
            first_block = tirx.truncdiv(task, int64(choice.panel_groups)) * blocks_each
            share = tirx.truncmod(task, int64(choice.panel_groups))
            self.begin_task()
            copy = kernel.scratch(kernel.size(self.copied()), dtype=str(self.bits.dtype)) if self.padded else None
            partial = kernel.scratch(kernel.size(self.partial()), dtype=self.sums) if choice.chunked else None
            with kernel.serial(tirx.min(blocks_each, blocks - first_block)) as number:
                block = first_block + number
                image = tirx.truncdiv(block, per_image)
                first_row = tirx.truncmod(block, per_image) * choice.block_rows
                source = self.source(copy, image, first_row)
                self.write_panels(source, partial, image, first_row, share)

    def begin_task(self) -> None:
        """What a task allocates besides."""

    def write_panels(self, source: tuple[Source, Any], partial: Any, image: Any, first_row: Any, share: Any) -> None:
        """The share of the panels over one block of rows of an image."""
        each = -(-self.panels // self.choice.panel_groups)
        first = share * each
        with self.kernel.serial(tirx.min(int64(each), self.panels - first)) as panel:
            self.write_panel(source, partial, image, first_row, first + panel)

    # Input ------------------------------------------------------------------------------------------------------------
    def copied_shape(self) -> tuple[int, Size]:
        """Rows and columns of input that a block reads."""
        window, choice = self.window, self.choice
        columns = self.shape[2]
        return (
            (choice.block_rows - 1) * window.strides[0] + _reach(window, 0),
            (columns - 1) * window.strides[1]
            + _reach(window, 1)
            + (0 if self.inner else -window.taps[1] % self.together),
        )

    def copied(self) -> Size:
        rows, columns = self.copied_shape()
        return rows * columns * int(self.x.shape[3])

    def partial(self) -> Size:
        pixels = self.choice.block_rows * self.shape[2]
        return (pixels + self.choice.tile.rows - 1) * self.columns

    def source(self, copy: Any, image: Any, first_row: Any) -> tuple[Source, Any]:
        """Where taps are read, and the position of the block's first one."""
        kernel, x = self.kernel, self.x
        strides = [kernel.size(stride) for stride in x.strides]
        start = kernel.size(x.offset) + image * strides[0] + first_row * self.window.strides[0] * strides[1]
        if copy is None:
            return Source(self.bits, *strides[1:]), start
        rows, columns = self.copied_shape()
        wide, channels = kernel.size(columns), int(x.shape[3])
        to = (
            Source(copy, wide * channels, int64(channels), int64(1))
            if self.inner
            else Source(copy, wide, int64(1), wide * rows)
        )
        self.copy_rows(to, rows, wide, image, first_row)
        return to, int64(0)

    def copy_rows(self, to: Source, rows: int, wide: Any, image: Any, first_row: Any) -> None:
        """The block's rows of x with zeros around them."""
        kernel, x, window = self.kernel, self.x, self.window
        strides = [kernel.size(stride) for stride in x.strides]
        height, width = kernel.size(x.shape[1]), kernel.size(x.shape[2])
        left = window.pads[1]
        inside = tirx.min(width, wide - left)
        each = int(x.shape[3]) if self.inner else 1
        together = self.inner and x.strides[2] == x.shape[3]
        planes = 1 if self.inner else int(x.shape[3])
        with kernel.serial(planes) as plane, kernel.serial(rows) as row:
            at = first_row * window.strides[0] + row - window.pads[0]
            place = plane * to.channel + row * to.row
            start = kernel.size(x.offset) + image * strides[0] + at * strides[1] + plane * strides[3]
            with T.If(tirx.all(at >= 0, at < height)):
                with T.Then():
                    self.fill(to.buffer, place, int64(left * each))
                    if together:
                        self.copy(to.buffer, place + left * each, start, int64(1), inside * each)
                    elif self.inner:
                        with kernel.serial(inside) as column:
                            to_column = place + (left + column) * each
                            self.copy(to.buffer, to_column, start + column * strides[2], int64(1), int64(each))
                    else:
                        self.copy(to.buffer, place + left, start, strides[2], inside)
                    self.fill(to.buffer, place + (left + inside) * each, (wide - left - inside) * each)
                with T.Else():
                    self.fill(to.buffer, place, wide * each)

    def fill(self, buffer: Any, place: Any, count: Any) -> None:
        zero = tirx.const(0, str(buffer.dtype))
        for_columns(self.kernel, count, lambda at: T.buffer_store(buffer, zero, [place + at]))

    def copy(self, buffer: Any, place: Any, start: Any, stride: Any, count: Any) -> None:
        for_columns(self.kernel, count, lambda at: T.buffer_store(buffer, self.bits[start + at * stride], [place + at]))

    # Products ---------------------------------------------------------------------------------------------------------
    def write_panel(self, source: tuple[Source, Any], partial: Any, image: Any, first_row: Any, panel: Any) -> None:
        """All tiles of a block: whole depth at once, or a row of taps after the other with partial sums between."""
        kernel, choice = self.kernel, self.choice
        rows = tirx.min(int64(choice.block_rows), self.height - first_row)
        pixels = rows * self.width
        tiles = tirx.floordiv(pixels + (choice.tile.rows - 1), int64(choice.tile.rows))
        block = Block((image * self.height + first_row) * self.width, pixels, panel)
        every, last = (0, self.window.taps[0]), self.window.taps[0] - 1
        if partial is None:
            with kernel.serial(tiles) as number:
                registers = self.tile()
                registers.zero()
                self.multiply(registers, source, block, number, *every)
                self.write_tile(registers, block, number)
            return
        with kernel.serial(tiles) as number:
            registers = self.tile()
            registers.zero()
            self.multiply(registers, source, block, number, 0, 1)
            registers.keep(partial, self.kept(number))
        with kernel.serial(last - 1) as tap_row, kernel.serial(tiles) as number:
            registers = self.tile()
            registers.read(partial, self.kept(number))
            self.multiply(registers, source, block, number, tap_row + 1, 1)
            registers.keep(partial, self.kept(number))
        with kernel.serial(tiles) as number:
            registers = self.tile()
            registers.read(partial, self.kept(number))
            self.multiply(registers, source, block, number, last, 1)
            self.write_tile(registers, block, number)

    def multiply(
        self, registers: RegisterTile, source: tuple[Source, Any], block: Block, number: Any, first: Any, count: int
    ) -> None:
        """Add the products over `count` rows of taps from the row `first` on."""
        kernel, window = self.kernel, self.window
        read, origin = source
        starts = self.starts(read, origin, block, number)

        def run(extent: int, stride: Any, offset: Any, depth: Any) -> None:
            registers.multiply(
                extent,
                lambda row, k: self.left(read.buffer, starts[row] + offset, k, stride),
                lambda k, c, lane: self.right(self.weight_place(block.panel, depth + k, c), lane),
                self.ahead(block, number, depth),
            )

        down, across = window.dilations[0] * read.row, window.dilations[1] * read.column
        if self.inner:
            each, columns = self.channels // self.together, window.taps[1]
            with kernel.serial(count) as row, kernel.serial(columns) as column:
                tap_row = first + row
                place, depth = tap_row * down + column * across, (tap_row * columns + column) * each
                self.run_channels(lambda at, count: run(count, read.channel, place + at * read.channel, depth + at))
            return
        steps = -(-window.taps[1] // self.together)
        with kernel.serial(self.channels) as channel, kernel.serial(count) as row:
            tap_row = first + row
            depth = (channel * window.taps[0] + tap_row) * steps
            run(steps, across, channel * read.channel + tap_row * down, depth)

    def ahead(self, block: Block, number: Any, depth: Any) -> Callable[[Any], None] | None:
        """Writes, at each step from `depth` on, the prefetch of its share of the lines that the tiles read next.

        These are the next panel's, or the next row of taps of this one; both lie behind what is read now.
        """
        tiles = self.tiles_together()
        if tiles is None:
            return None
        part = self.depth // self.window.taps[0] if self.choice.chunked else self.depth
        steps = max(1, part // self.choice.tile.steps)
        share = -(-part * self.columns // (_LINE_WORDS * tiles * steps))
        within = tirx.truncmod(depth, int64(part))
        following = self.weight_place(block.panel, depth - within + part, 0)

        def fetch(outer: Any) -> None:
            step = number * steps + tirx.truncdiv(within, int64(self.choice.tile.steps)) + outer
            for line in range(share):
                address = tirx.address_of(self.weights[following + (step * share + line) * _LINE_WORDS])
                T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))

        return fetch

    def tiles_together(self) -> int | None:
        """How many tiles pass over the same weights one after the other; None where it is known at run time."""
        height, width = self.shape[1], self.shape[2]
        if not self.inner or not isinstance(height, int) or not isinstance(width, int):
            return None
        return -(-min(self.choice.block_rows, height) * width // self.choice.tile.rows)

    def tile(self) -> RegisterTile:
        return (PairTile if self.pairs else RegisterTile)(self.kernel, self.choice.tile)

    def left(self, buffer: Any, start: Any, k: Any, stride: Any) -> Any:
        if self.pairs:
            return as_pair(buffer[start + 2 * k], buffer[start + 2 * k + 1])
        return buffer[start + k * stride]

    def right(self, start: Any, lane: Any) -> Any:
        """The weight at a lane of the vector from `start` on; a vector of pairs at the range of all lanes."""
        return self.weights[lane + start] if self.pairs else self.weights[start + lane].astype("float32")

    def weight_place(self, panel: Any, depth: Any, c: int) -> Any:
        """Where the vector `c` of a panel lies in the packed weights."""
        return panel * (self.depth * self.columns) + depth * self.columns + c * self.lanes

    def run_channels(self, run: Callable[[Any, int], None]) -> None:
        """`run` (first, count) the channels under one tap, or the pairs of them."""
        run(0, self.channels // self.together)

    def starts(self, read: Source, origin: Any, block: Block, number: Any) -> list[Any]:
        """Where the first tap of each of the tile's pixels lies; past the last pixel it is read again."""
        window, tile = self.window, self.choice.tile
        group = tirx.truncdiv(block.panel, int64(self.panels // self.groups)) * self.channels * read.channel
        found = []
        for r in range(tile.rows):
            pixel = tirx.min(number * tile.rows + r, block.pixels - 1)
            row, column = tirx.truncdiv(pixel, self.width), tirx.truncmod(pixel, self.width)
            place = row * window.strides[0] * read.row + column * window.strides[1] * read.column
            found.append(T.bind(origin + group + place))
        return found

    # Results ----------------------------------------------------------------------------------------------------------
    def kept(self, number: Any) -> Any:
        """Where a tile's sums lie between rows of taps."""
        return number * (self.choice.tile.rows * self.columns)

    def write_tile(self, registers: RegisterTile, block: Block, number: Any) -> None:
        """The element-wise tree over each pixel and channel of the tile that exists."""
        per_group = self.panels // self.groups
        group, local = tirx.truncdiv(block.panel, int64(per_group)), tirx.truncmod(block.panel, int64(per_group))
        first, each = number * self.choice.tile.rows, self.choice.tile.rows
        height, width, rows = self.shape[1], self.shape[2], self.choice.block_rows
        known = isinstance(height, int) and isinstance(width, int)
        whole = known and height % rows == 0 and rows * width % each == 0
        registers.write(
            self.result,
            self.end,
            self.output,
            rows=each if whole else block.pixels - first,
            position=lambda r: block.first_pixel + first + r,
            first=local * self.columns,
            width=self.outputs_each,
            before=group * self.outputs_each,
        )
