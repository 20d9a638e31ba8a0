"""Convolution by 3 x 3 filters with stride 1 through Winograd's minimal filtering F(4 x 4, 3 x 3).

A tile of 4 x 4 outputs costs 36 multiplications an input channel in place of 144 (Lavin and Gray 2016, "Fast Algorithms
for Convolutional Neural Networks", section 4.3): Y = A^T [(G g G^T) * (B^T d B)] A. The filters are transformed when
they are packed. A task transforms the inputs of a block of tiles into scratch, [36, tiles, C], then for one panel of
output channels after the other does 36 matrix products in register tiles and transforms the sums back, with the
epilogue on each output. Blocks are small enough that transformed inputs and sums stay in the L2 cache. Both transforms
run on vectors of channels: 144 and 130 operations on vectors a tile, for 36 C O / 16 multiply-adds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import UNUSUAL
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.register_tile import RegisterTile, Tile, choose_tile, tile_cost, tiles
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, View, fused_name

RULE = "winograd"
OUT, _IN = 4, 6  # outputs and inputs of a tile along one axis
POINTS = _IN * _IN
_NEAR, _FAR = 0.75, 1.5  # products are taken at 0, +-_NEAR, +-_FAR and infinity: a third of the error of 0, +-1, +-2
_CACHED_BYTES = 4 << 20  # of all weights, beyond which each use reads them from the last cache or memory
_READ = 8  # multiply-adds that take as long as reading one such weight
_BLOCK_BYTES = 512 << 10  # transformed inputs and sums of a block: half of a common L2 cache
_WEIGHT_BYTES = 12 << 20  # transformed filters beyond this, four times the others, are read too slowly
TOLERANCE = 3e-5  # of the largest output: how far results may be from those of direct products
_LEAST_CHANNELS = 32  # of inputs and outputs: with fewer the transforms cost more than they save


@dataclass(frozen=True)
class Configuration:
    """Register tile, output tiles of a block, and how blocks and panels are shared out between threads."""

    tile: Tile
    block_tiles: int
    tile_groups: int
    panel_groups: int


def is_possible(outputs: Shape, filters: Shape, groups: int, window: Window, target: Target) -> bool:
    """Whether the rule takes this convolution: fixed sizes, whole vectors of channels, filters that stay small."""
    _, height, width, count = outputs
    if not isinstance(height, int) or not isinstance(width, int) or groups != 1:
        return False
    plain = window.taps == (3, 3) and window.strides == window.dilations == (1, 1)
    channels = int(filters[1])
    return plain and channels % target.lanes == 0 and POINTS * channels * int(count) * 4 <= _WEIGHT_BYTES


def suits(outputs: Shape, filters: Shape, groups: int, window: Window, target: Target) -> bool:
    """Whether it is expected to be faster than the direct product: enough channels, full tiles."""
    _, height, width, count = outputs
    if not is_possible(outputs, filters, groups, window, target) or min(int(filters[1]), int(count)) < _LEAST_CHANNELS:
        return False
    return _tiles_of_image(outputs) * POINTS * 2 <= int(height) * int(width) * 9


def transform_filters(filters: np.ndarray, columns: int) -> np.ndarray:
    """G g G^T of [O, C, 3, 3] as [ceil(O / columns), 36, C, columns], zero where O ends; computed in float64.

    Row p of G is (1, p, p^2) over the product of the distances from p to the other points; that of infinity (0, 0, 1).
    """
    outputs, channels = filters.shape[:2]
    panels = -(-outputs // columns)
    points = (0.0, _NEAR, -_NEAR, _FAR, -_FAR)
    rows = [np.array([1, p, p * p]) / np.prod([p - other for other in points if other != p]) for p in points]
    matrix = np.array([*rows, [0, 0, 1]])
    spread = np.einsum("ij,ocjk,lk->iloc", matrix, filters.astype(np.float64), matrix)
    spread = spread.reshape(POINTS, outputs, channels)
    packed = np.zeros((POINTS, panels * columns, channels), np.float32)
    packed[:, :outputs] = spread
    return packed.reshape(POINTS, panels, columns, channels).transpose(1, 0, 3, 2)


def configure(outputs: Shape, channels: int, target: Target) -> Configuration:
    """The default for outputs [N, OH, OW, O]: the shares with the least work, blocks that fit the L2 cache.

    Where few pixels read many weights, reading them is most of the work, and shares of panels read each once.
    """
    best: tuple[float, Configuration] | None = None
    for tile_groups, panel_groups in _shares(target):
        block = _block_tiles(outputs, channels, tile_groups, 1)
        tile = choose_tile(target, block, int(outputs[3]), channels)
        choice = Configuration(tile, block, tile_groups, panel_groups)
        blocks, own_panels, columns = _own(outputs, choice, target)
        products = blocks * -(-block // tile.rows) * tile.rows * own_panels * columns * channels * POINTS
        weights = own_panels * columns * channels * POINTS
        read = blocks * weights if 4 * weights * panel_groups > _CACHED_BYTES else 0
        work = products + 2 * _transforms(outputs, channels, choice, target) + _READ * read
        if best is None or work < best[0]:
            best = work, choice
    assert best
    return best[1]


def worth_timing(outputs: Shape, channels: int, target: Target) -> list[Configuration]:
    """Every tile with blocks of three sizes and every way to share, the least expected time first."""
    costs: dict[Configuration, float] = {}
    for scale, (tile_groups, panel_groups) in itertools.product((1, 0.5, 2), _shares(target)):
        block = _block_tiles(outputs, channels, tile_groups, scale)
        for tile in tiles(target):
            choice = Configuration(tile, block, tile_groups, panel_groups)
            blocks, own_panels, columns = _own(outputs, choice, target)
            products = POINTS * blocks * tile_cost(target, tile, block, own_panels * columns, channels)
            cost = products + _transforms(outputs, channels, choice, target) / target.lanes
            costs.setdefault(choice, cost * (UNUSUAL if scale != 1 else 1))
    return sorted(costs, key=lambda choice: costs[choice])


def _shares(target: Target) -> list[tuple[int, int]]:
    """(groups of tiles, groups of panels) of the threads."""
    threads = target.threads
    return [(threads // panels, panels) for panels in range(1, threads + 1) if threads % panels == 0]


def _tiles_of_image(outputs: Shape) -> int:
    _, height, width, _ = outputs
    return -(-int(height) // OUT) * -(-int(width) // OUT)


def _block_tiles(outputs: Shape, channels: int, tile_groups: int, scale: float) -> int:
    """Tiles of a block: equal parts of a share, with values that fill `scale` times the cache's part for them."""
    own = -(-_tiles_of_image(outputs) // tile_groups)
    fitting = max(8, int(scale * _BLOCK_BYTES) // (POINTS * 4 * (channels + 64)))
    return -(-own // -(-own // fitting))


def _own(outputs: Shape, choice: Configuration, target: Target) -> tuple[int, int, int]:
    """Of one thread: blocks and panels, and the columns of a panel."""
    columns = choice.tile.vectors * target.lanes
    own, panels = -(-_tiles_of_image(outputs) // choice.tile_groups), -(-int(outputs[3]) // columns)
    return -(-own // choice.block_tiles), -(-panels // choice.panel_groups), columns


def _transforms(outputs: Shape, channels: int, choice: Configuration, target: Target) -> float:
    """Multiply-adds' worth of transforming inputs and sums."""
    blocks, own_panels, columns = _own(outputs, choice, target)
    return blocks * choice.block_tiles * (channels * 250 + own_panels * columns * 200)


@dataclass(frozen=True)
class Winograd:
    """x [N, H, W, C] with channel stride 1, weight as `transform_filters` packs it, outputs [N, OH, OW, O]."""

    x: View
    weight: View
    outputs: Shape
    window: Window
    choice: Configuration


def winograd(convolution: Winograd, result: Product, end: Any, name: str, target: Target) -> Code:
    """out[n, h, w, o] = sum over 3 x 3 taps and channels of x[n, h + kh - ph, w + kw - pw, c] g, then the tree `end`.

    Sums of transformed values: the error is a few times that of direct products, and an infinity in the input makes
    NaN of the outputs of every tile that reads it.
    """
    choice, channels = convolution.choice, int(convolution.x.shape[3])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        WinogradWriter(kernel, convolution, result, end, outputs[0]).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [convolution.x, convolution.weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "lanes": target.lanes,
            "outputs": f"{OUT}x{OUT}",
            "block_tiles": choice.block_tiles,
            "tile_groups": choice.tile_groups,
            "panel_groups": choice.panel_groups,
        },
        flops=2 * 9 * channels * product(convolution.outputs) + operations([end], target),
        extra_shapes=[convolution.outputs],
    )


class WinogradWriter:
    def __init__(self, kernel: Kernel, convolution: Winograd, result: Product, end: Any, output: Output) -> None:
        self.kernel, self.x, self.window = kernel, convolution.x, convolution.window
        self.result, self.end, self.output, self.choice = result, end, output, convolution.choice
        self.data, self.weights = kernel.flat(self.x.storage), kernel.flat(convolution.weight.storage)
        self.lanes = kernel.target.lanes
        self.panels, _, self.channels, self.columns = (int(size) for size in convolution.weight.shape)
        self.batch = kernel.size(convolution.outputs[0])
        self.height, self.width, self.count = (int(size) for size in convolution.outputs[1:])
        self.down, self.across = -(-self.height // OUT), -(-self.width // OUT)

    def write(self) -> None:
        """Tiles of all images are numbered through; a task takes its blocks of them and its panels."""
        kernel, choice = self.kernel, self.choice
        tiles = self.batch * (self.down * self.across)
        blocks = tirx.floordiv(tiles + (choice.block_tiles - 1), int64(choice.block_tiles))
        blocks_each = tirx.floordiv(blocks + (choice.tile_groups - 1), int64(choice.tile_groups))
        panels_each = -(-self.panels // choice.panel_groups)
        with kernel.parallel(choice.tile_groups * choice.panel_groups) as task:
            first_block = tirx.truncdiv(task, int64(choice.panel_groups)) * blocks_each
            first_panel = tirx.truncmod(task, int64(choice.panel_groups)) * panels_each
            inputs = kernel.scratch(POINTS * choice.block_tiles * self.channels)
            rows = -(-choice.block_tiles // choice.tile.rows) * choice.tile.rows
            sums = kernel.scratch(POINTS * rows * self.columns)
            with kernel.serial(tirx.min(blocks_each, blocks - first_block)) as number:
                first = (first_block + number) * choice.block_tiles
                here = tirx.min(int64(choice.block_tiles), tiles - first)
                self.transform_inputs(inputs, first, here)
                with kernel.serial(tirx.min(int64(panels_each), self.panels - first_panel)) as own:
                    panel = first_panel + own
                    self.multiply(inputs, sums, here, panel)
                    self.transform_sums(sums, rows, first, here, panel)

    # Transforms -------------------------------------------------------------------------------------------------------
    def tile_place(self, tile: Any) -> tuple[Any, Any, Any]:
        """(image, first output row, first output column) of a tile."""
        each = self.down * self.across
        image, inside = tirx.truncdiv(tile, int64(each)), tirx.truncmod(tile, int64(each))
        row, column = tirx.truncdiv(inside, int64(self.across)), tirx.truncmod(inside, int64(self.across))
        return T.bind(image), T.bind(row * OUT), T.bind(column * OUT)

    def transform_inputs(self, inputs: Any, first: Any, here: Any) -> None:
        """B^T d B of every tile and vector of channels; rows and columns outside of x are zero."""
        kernel, x = self.kernel, self.x
        strides = [kernel.size(stride) for stride in x.strides]
        extents = [kernel.size(x.shape[1]), kernel.size(x.shape[2])]
        with kernel.serial(here) as tile:
            image, top, left = self.tile_place(first + tile)
            start = T.bind(kernel.size(x.offset) + image * strides[0])
            rows = [self.tap(top + i - self.window.pads[0], extents[0], strides[1]) for i in range(_IN)]
            columns = [self.tap(left + i - self.window.pads[1], extents[1], strides[2]) for i in range(_IN)]
            with self.input_vectors() as (source, vector):
                channel = start + source * self.lanes

                def read(i: int, j: int, lane: Any, channel: Any = channel) -> Any:
                    (row, row_inside), (column, column_inside) = rows[i], columns[j]
                    inside = tirx.all(row_inside, column_inside)
                    value = self.data[channel + row + column + lane].astype("float32")
                    return tirx.Select(inside, value, tirx.const(0, "float32"))

                def write(i: int, j: int, lane: Any, value: Any, vector: Any = vector) -> None:
                    place = ((i * _IN + j) * self.choice.block_tiles + tile) * self.channels + vector * self.lanes
                    T.buffer_store(inputs, value, [place + lane])

                self.both_axes(spread_inputs, _IN, read, write)

    @contextmanager
    def input_vectors(self) -> Iterator[tuple[Any, Any]]:
        """A loop over the vectors of channels that take part: the number of each in x and in scratch."""
        with self.kernel.serial(self.channels // self.lanes) as vector:
            yield vector, vector

    def tap(self, position: Any, extent: Any, stride: Any) -> tuple[Any, Any]:
        """(offset, whether it lies inside); outside the offset is that of an element that exists."""
        inside = tirx.all(position >= 0, position < extent)
        clamped = tirx.max(tirx.min(position, extent - 1), int64(0))
        return T.bind(clamped * stride), T.bind(inside)

    def both_axes(
        self,
        transform: Callable[[Sequence[Any]], list[Any]],
        count: int,
        read: Callable[[int, int, Any], Any],
        write: Callable[[int, int, Any, Any], None],
    ) -> None:
        """Transform the columns of 6 x 6 vectors into registers, then the rows of what comes of it."""
        kernel = self.kernel
        middle = kernel.registers(count, _IN, self.lanes)
        for j in range(_IN):
            with kernel.vectorized(self.lanes) as lane:
                for i, value in enumerate(transform([T.bind(read(k, j, lane)) for k in range(_IN)])):
                    T.buffer_store(middle, value, [i, j, lane])
        for i in range(count):
            with kernel.vectorized(self.lanes) as lane:
                for j, value in enumerate(transform([middle[i, k, lane] for k in range(_IN)])):
                    write(i, j, lane, value)

    def transform_sums(self, sums: Any, rows: int, first: Any, here: Any, panel: Any) -> None:
        """A^T m A of every tile and vector of the panel's channels, and the tree `end` over the outputs that exist."""
        kernel = self.kernel
        with kernel.serial(here) as tile:
            image, top, left = self.tile_place(first + tile)
            for c in range(self.choice.tile.vectors):
                outputs = kernel.registers(OUT, OUT, self.lanes)

                def read(i: int, j: int, lane: Any, c: int = c) -> Any:
                    return sums[((i * _IN + j) * rows + tile) * self.columns + c * self.lanes + lane]

                def write(i: int, j: int, lane: Any, value: Any, outputs: Any = outputs) -> None:
                    T.buffer_store(outputs, value, [i, j, lane])

                self.both_axes(gather_outputs, OUT, read, write)
                column = self.column(panel, c)
                for i in range(OUT):
                    for j in range(OUT):
                        row = (image * self.height + top + i) * self.width + left + j
                        inside = tirx.all(top + i < self.height, left + j < self.width)
                        with T.If(inside), T.Then():
                            self.write_output(outputs, i, j, row, column)

    def column(self, panel: Any, c: int) -> Any:
        """The first channel of vector `c` of a panel."""
        return panel * self.columns + c * self.lanes

    def write_output(self, outputs: Any, i: int, j: int, row: Any, column: Any) -> None:
        kernel = self.kernel

        def store(lane: Any) -> None:
            kernel.define(self.result, lambda _: outputs[i, j, lane])
            index = kernel.index(self.end.shape, row=row, column=column + lane)
            self.output.store(row * self.count + column + lane, kernel.load(self.end, index))

        def whole() -> None:
            with kernel.vectorized(self.lanes) as lane:
                store(lane)

        if self.count % self.columns == 0:
            whole()
            return
        with T.If(column + self.lanes <= self.count):
            with T.Then():
                whole()
            with T.Else(), kernel.serial(tirx.max(int64(0), self.count - column)) as lane:
                store(lane)
                kernel.forget()

    # Products ---------------------------------------------------------------------------------------------------------
    def multiply(self, inputs: Any, sums: Any, here: Any, panel: Any) -> None:
        """For each of the 36 points, the block's tiles x channels times channels x the panel's outputs."""
        kernel, choice, tile = self.kernel, self.choice, self.choice.tile
        row_tiles = tirx.floordiv(here + (tile.rows - 1), int64(tile.rows))
        rows = -(-choice.block_tiles // tile.rows) * tile.rows
        with kernel.serial(POINTS) as point, kernel.serial(row_tiles) as number:
            registers = RegisterTile(kernel, tile)
            registers.zero()
            starts = [
                T.bind((point * choice.block_tiles + tirx.min(number * tile.rows + r, here - 1)) * self.channels)
                for r in range(tile.rows)
            ]
            self.multiply_point(registers, inputs, starts, panel, point)
            registers.keep(sums, (point * rows + number * tile.rows) * self.columns)

    def multiply_point(
        self, registers: RegisterTile, inputs: Any, starts: Sequence[Any], panel: Any, point: Any
    ) -> None:
        """The product at one of the 36 points over the channels that take part."""
        weights = (panel * POINTS + point) * (self.channels * self.columns)
        registers.multiply(
            self.channels,
            lambda r, k: inputs[starts[r] + k],
            lambda k, c, lane: self.weights[weights + k * self.columns + c * self.lanes + lane],
        )


def spread_inputs(d: Sequence[Any]) -> list[Any]:
    """B^T d of six vectors, in 12 multiply-adds: d as a polynomial, divided by each point's factor, at that point.

    The points p and -p share the even and the odd part of x (x + p) (x^2 - q^2).
    """
    near, far = _NEAR**2, _FAR**2
    result = [d[4] - _f32(near + far) * d[2] + _f32(near * far) * d[0]]
    for point, other in ((_NEAR, far), (_FAR, near)):
        even, odd = T.bind(d[4] - _f32(other) * d[2]), T.bind(d[3] - _f32(other) * d[1])
        result += [even + _f32(point) * odd, even - _f32(point) * odd]
    return [*result, d[5] - _f32(near + far) * d[3] + _f32(near * far) * d[1]]


def gather_outputs(m: Sequence[Any]) -> list[Any]:
    """A^T m of six vectors: each product times its point to the power of the row."""
    near, near_odd = T.bind(m[1] + m[2]), T.bind(m[1] - m[2])
    far, far_odd = T.bind(m[3] + m[4]), T.bind(m[3] - m[4])
    return [
        m[0] + near + far,
        _f32(_NEAR) * near_odd + _f32(_FAR) * far_odd,
        _f32(_NEAR**2) * near + _f32(_FAR**2) * far,
        _f32(_NEAR**3) * near_odd + _f32(_FAR**3) * far_odd + m[5],
    ]


def _f32(value: float) -> Any:
    return tirx.const(value, "float32")
